"""UM3 in use: the pipeline, sampling, the decoder and what they return."""
