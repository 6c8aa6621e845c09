"""What every room of the house needs and no model does.

Configs, ranks, logging, metrics, seeds, progress, atomic files and safe image reading live here.
"""
