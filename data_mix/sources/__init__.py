"""Sources: image and text data sets, each an index from numbers to samples."""
