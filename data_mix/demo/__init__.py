"""The demo's data, which needs no download: scenes with captions and a checker, digits, and prose."""
