"""Tasks: what `make eval` measures."""
