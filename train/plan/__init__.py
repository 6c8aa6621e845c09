"""What fits on which GPU, and how long training takes."""
