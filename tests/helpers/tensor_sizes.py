"""Records what torch computes: the largest tensor, and the shapes of matrix products."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorSizes(TorchDispatchMode):
    """`largest`: elements of the largest tensor made under it; `products`: the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [tensor for tensor in tree_leaves(result) if isinstance(tensor, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in tensors)])
        if "_linear_pointwise" in str(function) or "mm" in str(function):
            self.products += [tuple(tensor.shape) for tensor in tensors]
        return result
