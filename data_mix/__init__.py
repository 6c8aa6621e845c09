"""Data: image and text sources, code shards, the calm-down schedule, row order, packing and the loader.

Knows nothing of optimizers or training loops. A source maps an index to one sample and holds no hidden state.
"""
