"""The algorithm. Uses neither files nor clocks, and reaches other ranks only through the World protocol."""
