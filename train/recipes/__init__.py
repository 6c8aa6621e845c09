"""Recipes: stage 1, stage 2 and UM3, and how UM3 starts from a language model."""
