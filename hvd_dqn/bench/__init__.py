"""What a user can measure on their own machine."""
