"""What the algorithm is. Knows no files and no clock, and of other ranks only the World protocol."""
