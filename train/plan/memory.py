"""What a training step holds on one device: the model's part traced without memory, DeepSpeed's part by formula.

The trace runs the real objective, forward and backward, on fake tensors (shapes without data) and counts what is alive
after every operation: activations, recomputation, logits and temporaries are the model's own. It takes the CPU's
operators; a GPU's attention keeps the same tensors (queries, keys, values, output, log-sum-exp).

DeepSpeed's part was read in the source of 0.19.8 (runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py). Bytes, for
P parameters of w bytes (2 in bf16, else 4), N devices and b = min(bucket, P):

    ZeRO        0           1               2               3
    weights     w P         w P             w P             w P / N + w x those gathered at a time
    optimizer   8 P         12 P / N        12 P / N        12 P / N    two moments, above 0 masters; 4 more: average
    gradients   w P         w P             w P / N         w P / N
    buffers     w P <= 2e9  w b             w b (+ w b)     w b + w b   the bucket, and its copy while it is reduced
    step        t P         (4 + t) P / N   (4 + t) P / N   (4 + t) P / N

The copy in brackets is made among N > 1 only; where the bucket takes all gradients, they are nowhere else at that time.
The step makes a flat float32 copy of the gradients beside them; t is what AdamW needs besides: 0 fused, 4 on CUDA
otherwise, 8 on a CPU (at ZeRO 0 for the largest parameter alone). Gathering the new weights fills them in place. ZeRO 3
keeps gathered what is used again within 1e9 elements, so about 5e8 before the backward pass begins, the head, and 5e7
fetched ahead. Every device starts with the whole model.

Memory is what is allocated; on a CPU what is touched, so that buffers count as they fill.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

MOMENTS, MASTERS, AVERAGE = 8, 4, 4
"""Bytes of a parameter's optimizer state."""
ALLREDUCE_ELEMENTS = 500_000_000
"""What DeepSpeed flattens at a time at ZeRO 0 (MEMORY_OPT_ALLREDUCE_SIZE)."""
REUSE_ELEMENTS, PREFETCH_ELEMENTS = 1_000_000_000, 50_000_000
"""ZeRO 3's defaults: stage3_max_reuse_distance, stage3_prefetch_bucket_size."""


class Peak(NamedTuple):
    """Bytes alive at the moment of the most: gradients of parameters, and all else but weights."""

    other: float
    gradients: float


class Trace(NamedTuple):
    """One micro-batch forward and backward. `peaks` by the share of each gradient that stays on this device."""

    activations: int
    """Kept for the backward pass when the layers are through (bytes)."""
    peaks: Mapping[float, Peak]


class Usage(NamedTuple):
    """Bytes on one device at the moment of the most."""

    moment: str
    weights: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    """Logits and their gradients, the layer in work, temporaries."""
    buffers: float
    """DeepSpeed's buckets."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.working + self.buffers


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model lies on its devices.

    parameters, largest, head: elements of all, of the largest, and of the output head.
    weight_bytes: of a weight and its gradient.
    accumulates: more than one micro-batch a step.
    """

    zero_stage: int
    devices: int
    parameters: int
    largest: int
    head: int
    weight_bytes: int
    bucket_elements: int
    average: bool = False
    fused: bool = True
    offload: bool = False
    accumulates: bool = False
    on_cpu: bool = False

    @property
    def bucket(self) -> int:
        """Elements of the reduce bucket (`train.engine`)."""
        return min(self.bucket_elements, self.parameters)

    @property
    def gradient_share(self) -> float:
        """The share of each gradient that stays on a device as the backward pass goes; 0 where all have their place
        before it begins."""
        if self.accumulates or (self.zero_stage >= 2 and not self.on_cpu):
            return 0.0
        return 1 / self.devices if self.zero_stage >= 2 and self.bucket < self.parameters else 1.0


def usage(layout: Layout, trace: Trace) -> Usage:
    """The most that a device holds during a step, and when."""
    stage, size, every = layout.zero_stage, layout.weight_bytes, layout.parameters
    part, bucket, many = every / layout.devices, size * layout.bucket, layout.devices > 1
    at_once = layout.bucket == every and not layout.accumulates  # all gradients are reduced after the backward pass
    state = (MOMENTS + (MASTERS if stage else 0) + (AVERAGE if layout.average else 0)) * (part if stage else every)
    gathered = min(every, layout.head + REUSE_ELEMENTS // 2 + PREFETCH_ELEMENTS) if many else 0

    def at(moment: str, **values: float) -> Usage:
        usual = dict.fromkeys(Usage._fields[1:], 0.0)
        usual["weights"] = size * (part + gathered if stage == 3 else every)
        usual["optimizer"] = 0.0 if layout.offload else state
        usual["gradients"] = size * (part if stage >= 2 else every)
        return Usage(moment, **usual | values)

    start = at("start", weights=size * every * (2 if stage in (1, 2) else 1), optimizer=0, gradients=0)
    if stage == 0:
        reduce = at("reduce", buffers=size * min(every, ALLREDUCE_ELEMENTS + layout.largest))
    elif stage == 1 or not (many or stage == 3):
        reduce = at("reduce", buffers=bucket)
    elif stage == 2 and at_once:
        reduce = at("reduce", gradients=0, buffers=2 * bucket)
    else:
        reduce = at("reduce", buffers=2 * bucket)
    peak = trace.peaks[layout.gradient_share]
    activations = min(trace.activations, peak.other)
    backward = at("backward", activations=activations, working=peak.other - activations)
    if layout.gradient_share:
        grown = layout.gradient_share * peak.gradients + (size * part if stage == 3 else 0)
        backward = backward._replace(gradients=grown)
    if stage >= 2 and not (layout.on_cpu and at_once):
        backward = backward._replace(buffers=reduce.buffers)
    elif stage == 1 and not layout.on_cpu:
        backward = backward._replace(buffers=bucket)
    kept = size * (part if stage else every)  # what others step has been given to them
    step = at("step", gradients=kept, working=0 if layout.offload else _step_bytes(layout))
    return max(start, backward, reduce, step, key=lambda found: found.total)


def _step_bytes(layout: Layout) -> float:
    """What the optimizer's step holds for its time."""
    own = 0 if layout.fused else 8 if layout.on_cpu else 4
    if layout.zero_stage == 0:
        return own * (layout.largest if layout.on_cpu else layout.parameters)
    flat = layout.weight_bytes if layout.weight_bytes < 4 else 0  # copied flat first, to float32 then
    return (4 + max(own, flat)) * layout.parameters / layout.devices


class Tracer:
    """Traces of an objective that was built on the meta device; `body` is its part whose end is the layers' end."""

    def __init__(self, objective: nn.Module, *, body: nn.Module, precision: str):
        self.objective, self.body, self.precision = objective.train(), body, precision
        self.mode = FakeTensorMode()
        with self.mode:
            _fake(objective, dtype=torch.bfloat16 if precision == "bf16-true" else None)

    def trace(self, *inputs: Tensor, shares: Iterable[float]) -> Trace:
        """A micro-batch: integers and masks, which are followed for real, so that what they select has its size."""
        alive = _Alive(self.mode, shares)
        found: list[int] = []
        hooks = [self.body.register_forward_hook(lambda *_: found.append(alive.other))]
        for parameter in self.objective.parameters():
            hooks.append(parameter.register_post_accumulate_grad_hook(alive.count_gradient))
        with self.mode, torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            alive.ignore([*self.objective.parameters(), *self.objective.buffers()])
            arguments = [alive.follow(each) for each in inputs]
            with alive:
                sums = self.objective(*arguments)
                loss = sum(each for each in sums if each.requires_grad)
                assert isinstance(loss, Tensor)
                loss.backward()
        for hook in hooks:
            hook.remove()
        self.objective.zero_grad()
        return Trace(found[0], alive.peaks)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as they live."""

    def __init__(self, mode: FakeTensorMode, shares: Iterable[float]):
        super().__init__()
        self.mode = mode
        self.other = self.gradients = 0
        self.peaks = {share: Peak(0, 0) for share in shares}
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.real = WeakTensorKeyDictionary()
        """Integers and masks whose values are known, by their fake."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        real = self._really(func, args, kwargs)
        if func is torch.ops.aten.nonzero.default:
            assert real is not None, "a mask that does not follow from the inputs"
            result = self.follow(real)
        elif func is torch.ops.aten._local_scalar_dense.default and real is not None:
            return real.item()
        elif func is torch.ops.aten.index.Tensor:
            result = func(args[0], [place for index in args[1] for place in self._places(index)])
        else:
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and real is not None:
            self.real[result] = real
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """What was there before."""
        for tensor in tensors:
            self.known.add(tensor.untyped_storage())

    def follow(self, tensor: Tensor) -> Tensor:
        """The fake of a real tensor of integers or truth values."""
        fake = self.mode.from_tensor(tensor)
        self.real[fake] = tensor
        return fake

    def count_gradient(self, parameter: Tensor) -> None:
        """From now on `parameter`'s gradient is one."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        self.other, self.gradients = self.other - size, self.gradients + size

    def _really(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """The result on real tensors, where all are known and it is a tensor of integers or truth values."""
        leaves, layout = tree_flatten((args, kwargs))
        if not all(leaf in self.real for leaf in leaves if isinstance(leaf, Tensor)):
            return None
        if torch.is_floating_point(torch.empty(0, dtype=kwargs.get("dtype") or torch.long)):
            return None
        args, kwargs = tree_unflatten(
            [self.real[leaf] if isinstance(leaf, Tensor) else leaf for leaf in leaves], layout
        )
        with _disable_current_modes():
            result = func(*args, **kwargs)
        return result if isinstance(result, Tensor) and not result.is_floating_point() else None

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """An index without a mask."""
        if index is None or index.dtype != torch.bool:
            return [index]
        with _disable_current_modes():
            places = self.real[index].nonzero(as_tuple=True)
        return [self.follow(place) for place in places]

    def _count(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._release, size)
        self.other += size
        for share, peak in self.peaks.items():
            if self.other + share * self.gradients > peak.other + share * peak.gradients:
                self.peaks[share] = Peak(self.other, self.gradients)

    def _release(self, size: int) -> None:
        self.other -= size


def _fake(module: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Put empty tensors of the ambient kind in the place of parameters and buffers; floats in `dtype`."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    seen: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = seen.setdefault(id(parameter), nn.Parameter(empty(parameter)))
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = empty(buffer)
