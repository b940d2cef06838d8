"""Makes, steps, saves and restores environments. Independent of learning."""
