"""What a person sees of a run: files, the display and pictures."""
