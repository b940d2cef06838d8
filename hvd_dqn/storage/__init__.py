"""What outlives a process: checkpoints and the run directory."""
