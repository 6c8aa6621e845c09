"""What every room needs and no model does: configs, ranks, logging, metrics, seeds, progress, atomic files, images."""
