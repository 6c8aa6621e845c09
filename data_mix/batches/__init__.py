"""Batches: what one training step reads, as a function of (seed, step)."""
