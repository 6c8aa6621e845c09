"""Training: the one loop, the DeepSpeed engine, checkpoints, optimizers and the three recipes.

`python -m train.stage1`, `train.stage2` and `train.um3` are the phases; `train/loop.py` shows their common order.
"""
