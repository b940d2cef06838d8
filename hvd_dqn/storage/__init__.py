"""What remains after a process ends: checkpoints and the run directory."""
