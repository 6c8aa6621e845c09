"""Image and text sources: each maps an index to a sample."""
