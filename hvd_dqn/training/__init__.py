"""The training loop: what every rank does in which cycle, with what it owns."""
