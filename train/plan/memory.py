"""Memory of a training step on one device: the model's part is traced without data, DeepSpeed's part is computed.

The trace runs the real objective, forward and backward, on fake tensors (shapes without data), and counts the bytes
that are alive after every operation: activations, recomputation, logits, temporaries. It uses the CPU's operators;
attention on a GPU keeps the same tensors (queries, keys, values, output, log-sum-exp).

DeepSpeed's part follows the source of 0.19.8 (runtime/engine.py, zero/stage_1_and_2.py, zero/stage3.py). Bytes, for P
trained parameters of w bytes (2 for bf16-true, else 4), N devices and b = min(bucket, P); frozen ones (a base under
LoRA) add to the weights only:

    ZeRO        0           1               2               3
    weights     w P         w P             w P             w P / N + w x the gathered ones
    optimizer   8 P         12 P / N        12 P / N        12 P / N    two moments, ZeRO: masters; average: 4 more
    gradients   w P         w P             w P / N         w P / N
    buffers     w P <= 2e9  w b             w b (+ w b)     w b + w b   the bucket, and its copy while it is reduced
    step        t P         (4 + t) P / N   (4 + t) P / N   (4 + t) P / N

The copy in brackets and ZeRO 0's buffers exist for N > 1 only; if the bucket holds all gradients, they exist nowhere
else at that time. The step makes a flat float32 copy of the gradients, and AdamW needs t more: 0 if fused, else 4 on
CUDA and 8 on a CPU (at ZeRO 0 for the largest parameter alone). ZeRO 3 keeps gathered what it uses again within 1e9
elements (about 5e8 when the backward pass begins), the output head, and 5e7 elements that it prefetches. Every device
starts with the whole model. Memory is allocated memory; on a CPU it is resident memory, so buffers count as they are
filled.
"""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

MOMENTS, MASTERS, AVERAGE = 8, 4, 4
"""Bytes of optimizer state of a parameter."""
ALLREDUCE_ELEMENTS = 500_000_000
"""Elements that DeepSpeed flattens at a time at ZeRO 0 (MEMORY_OPT_ALLREDUCE_SIZE)."""
REUSE_ELEMENTS, PREFETCH_ELEMENTS = 1_000_000_000, 50_000_000
"""ZeRO 3's defaults: stage3_max_reuse_distance, stage3_prefetch_bucket_size."""


class Peak(NamedTuple):
    """Bytes at the moment of the highest memory: gradients of parameters, and everything else but weights."""

    other: float
    gradients: float


class Trace(NamedTuple):
    """Forward and backward pass of one micro-batch. `peaks`: by the share of each gradient that stays on the device."""

    activations: int
    """Bytes kept for the backward pass when the layers' forward pass ends."""
    peaks: Mapping[float, Peak]


class Usage(NamedTuple):
    """Bytes on one device at the moment of the highest memory: start, backward, reduce or step."""

    moment: str
    weights: float
    optimizer: float
    gradients: float
    activations: float
    working: float
    """Logits and their gradients, the layer at work, temporaries."""
    buffers: float
    """DeepSpeed's buckets."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return float(sum(self[1:]))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is placed on its devices; a weight and its gradient have `weight_bytes` each.

    `parameters`, `largest`, `head`: number of elements of the trained parameters, the largest of them, and the output
    head; `frozen`: of the parameters that are not trained. A step that `accumulates` has several micro-batches.
    """

    zero_stage: int
    devices: int
    parameters: int
    largest: int
    head: int
    weight_bytes: int
    bucket_elements: int
    frozen: int = 0
    average: bool = False
    fused: bool = True
    offload: bool = False
    accumulates: bool = False
    on_cpu: bool = False
    beside_bytes: float = 0.0
    """Weights beside the engine's model, such as a text encoder's."""

    @property
    def bucket(self) -> int:
        """Elements of the reduce bucket (see `train.engine`)."""
        return min(self.bucket_elements, self.parameters)

    @property
    def gradient_share(self) -> float:
        """The share of each gradient that stays on a device during the backward pass; 0 if all are allocated before."""
        if self.accumulates or (self.zero_stage >= 2 and not self.on_cpu):
            return 0.0
        return 1 / self.devices if self.zero_stage >= 2 and self.bucket < self.parameters else 1.0


def usage(layout: Layout, trace: Trace) -> Usage:
    """The highest memory of a device during a step, and its moment."""
    stage, size, whole = layout.zero_stage, layout.weight_bytes, layout.parameters
    part, bucket, many = whole / layout.devices, size * layout.bucket, layout.devices > 1
    model, beside = whole + layout.frozen, layout.beside_bytes
    at_once = layout.bucket == whole and not layout.accumulates  # all gradients are reduced after the backward pass
    state = (MOMENTS + (MASTERS if stage else 0) + (AVERAGE if layout.average else 0)) * (part if stage else whole)
    gathered = min(model, layout.head + REUSE_ELEMENTS // 2 + PREFETCH_ELEMENTS) if many else 0

    def at(moment: str, **parts: float) -> Usage:
        usual = dict.fromkeys(Usage._fields[1:], 0.0)
        usual["weights"] = beside + size * (model / layout.devices + gathered if stage == 3 else model)
        usual["optimizer"] = 0.0 if layout.offload else state
        usual["gradients"] = size * (part if stage >= 2 else whole)
        return Usage(moment, **usual | parts)

    start = at("start", weights=beside + size * (model + (whole if stage in (1, 2) else 0)), optimizer=0, gradients=0)
    if stage == 0:
        reduce = at("reduce", buffers=size * min(whole, ALLREDUCE_ELEMENTS + layout.largest) if many else 0)
    elif stage == 1 or not (many or stage == 3):
        reduce = at("reduce", buffers=bucket)
    else:
        reduce = at("reduce", buffers=2 * bucket, **({"gradients": 0} if stage == 2 and at_once else {}))
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
    kept = size * (part if stage else whole)  # gradients of other ranks' parameters have been freed
    step = at("step", gradients=kept, working=0 if layout.offload else _step_bytes(layout))
    return max(start, backward, reduce, step, key=lambda usage: usage.total)


def _step_bytes(layout: Layout) -> float:
    """Temporaries of the optimizer's step."""
    own = 0 if layout.fused else 8 if layout.on_cpu else 4
    if layout.zero_stage == 0:
        return own * (layout.largest if layout.on_cpu else layout.parameters)
    flat = layout.weight_bytes if layout.weight_bytes < 4 else 0  # concatenated first, then converted to float32
    return (4 + max(own, flat)) * layout.parameters / layout.devices


class Tracer:
    """Traces an objective that was built on the meta device; `body` is the part that ends where the layers end."""

    def __init__(self, objective: nn.Module, *, body: nn.Module, precision: str):
        self.objective, self.body, self.precision = objective.train(), body, precision
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            _make_fake(objective, dtype=torch.bfloat16 if precision == "bf16-true" else None)

    def trace(self, *inputs: Tensor, shares: Iterable[float]) -> Trace:
        """Trace one micro-batch of real integers and masks."""
        alive = _AliveBytes(shares)
        activations: list[int] = []
        hooks = [self.body.register_forward_hook(lambda *_: activations.append(alive.other))]
        for parameter in self.objective.parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_post_accumulate_grad_hook(alive.count_gradient))
        weights = [*self.objective.parameters(), *self.objective.buffers()]
        alive.known.update(tensor.untyped_storage() for tensor in weights)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed")
        with self.mode, autocast, alive:
            sums = self.objective(*inputs)
            loss = sum(value for value in sums if value.requires_grad)
            assert isinstance(loss, Tensor)
            loss.backward()
        for hook in hooks:
            hook.remove()
        self.objective.zero_grad()
        return Trace(activations[0], alive.peaks)


# Not torch's MemTracker (torch 2.13): under FakeTensorMode the loss's boolean masks stop it
# (DynamicOutputShapeException), and on real tensors it finds 0.94 GiB where this plan predicts 1.33.
class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, for as long as they live.

    Operations on real tensors alone (ids, masks, positions) stay real, because their values decide sizes.
    """

    def __init__(self, shares: Iterable[float]):
        super().__init__()
        self.other = self.gradients = 0
        self.peaks = {share: Peak(0, 0) for share in shares}
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_real = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if is_real and (tensors or not (kwargs.get("dtype") or torch.long).is_floating_point):
            with _disable_current_modes():
                result = func(*args, **kwargs)
        elif func is torch.ops.aten.index.Tensor:  # boolean masks as places: fake masks have no size
            result = func(args[0], [place for index in args[1] for place in _places(index)])
        else:
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def count_gradient(self, parameter: Tensor) -> None:
        """Count a gradient that backward has completed as one."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        self.other, self.gradients = self.other - size, self.gradients + size

    def _count(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._add, -size)
        self._add(size)
        for share, peak in self.peaks.items():
            if self.other + share * self.gradients > peak.other + share * peak.gradients:
                self.peaks[share] = Peak(self.other, self.gradients)

    def _add(self, size: int) -> None:
        self.other += size


def _places(index: Tensor | None) -> list[Tensor | None]:
    """An index without a mask: the mask's places in each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    with _disable_current_modes():
        return list(index.nonzero(as_tuple=True))


def _make_fake(module: nn.Module, *, dtype: torch.dtype | None) -> None:
    """Replace parameters and buffers by empty tensors of the ambient mode; floating-point ones in `dtype`."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)

    seen: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = seen.setdefault(id(parameter), fake)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer)
