"""The config sections of the recipes; no module here imports torch."""
