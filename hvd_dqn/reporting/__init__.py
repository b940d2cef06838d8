"""What users see of a run: files, the display and plots."""
