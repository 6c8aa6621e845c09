"""UM3: the id space, the extended language model, split softmax, sampling, export and the command line.

`um3.core` holds what every room needs (configs, files, logging); the rest of `um3` knows neither
data sets nor optimizers.
"""
