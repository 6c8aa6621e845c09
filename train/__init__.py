"""Training: the one loop, the DeepSpeed engine, checkpoints, optimizers and the three recipes.

`python -m train PHASE` runs a recipe; `train/loop.py` shows their common order.
"""
