"""Environments: made, stepped, saved and restored. Knows nothing of learning."""
