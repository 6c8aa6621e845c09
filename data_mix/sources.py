"""Image sources by name: one config, one function that opens it."""

from data_mix.samples import BadSample, ImageSource, Sample, Split

__all__ = ["BadSample", "ImageSource", "Sample", "Split"]
