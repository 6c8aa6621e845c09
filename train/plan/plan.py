"""`python -m train plan --config FILE --gpus N --gpu NAME`: what of UM3's training fits which GPUs, and its time.

One line for each ZeRO stage with and without activation checkpointing, at the largest micro-batch that fits (the
config's at most): memory of one device at the moment of the most (`train/plan/memory.py`), tokens per second, days for
`loop.max_steps`. Nothing is downloaded or allocated; the model is built from its config alone.

Time is floating-point operations over what the GPUs reach. Counted are the matrix products, 2 operations for each
multiply-add, 3 forward passes for forward and backward: the layers' weights for every token, scores and values of
attention (whole, also where causal: PaLM, arXiv 2204.02311, appendix B), and the head for every target, with the rows
of its half alone. Activation checkpointing runs the layers forward once more and the loss its logits: that takes time,
but is no model FLOP. What communication, reading and saving cost is in --mfu, which no formula tells.
"""

import argparse
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from train.config import EngineConfig, UM3Config
from um3.core.commands import command_parser, read_config
from um3.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from data_mix.batches.packing import Rows
    from train.plan.memory import Trace, Tracer, Usage
    from train.recipes.um3 import UM3Objective
    from um3.model.sequences import Row
    from um3.model.vocabulary import UnifiedVocabulary

GIB = 2**30
MFU = 0.35
"""Somewhat below the 0.38 to 0.43 that Llama 3 reached in bf16 on H100s with kernels of its own (arXiv 2407.21783,
table 4)."""
KEPT_FREE = 0.1
"""Share of a GPU's memory for the CUDA context, NCCL, cuBLAS and fragmentation, and for this page's error."""
CAPTION_TOKENS = 64
PATCHES = 256
"""Of QLIP-B-16-256; where the config's tokenizer is not there, so far as rows have room for them."""
KNOWN_BASES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    }
}
"""Shapes that need no look-up."""


class Gpu(NamedTuple):
    """Memory (GiB) and dense rates (TFLOP/s): tensor cores in bf16, float32 without TF32."""

    memory_gib: float
    bf16_tflops: float
    float32_tflops: float


GPUS = {
    "a100-40": Gpu(40, 312, 19.5),
    "a100-80": Gpu(80, 312, 19.5),
    "h100": Gpu(80, 989, 67),
    "h200": Gpu(141, 989, 67),
    "b200": Gpu(180, 2250, 75),
    "l4": Gpu(24, 121, 30.3),
    "l40s": Gpu(48, 362, 91.6),
    "rtx3090": Gpu(24, 71, 35.6),
    "rtx4090": Gpu(24, 165, 82.6),
    "rtx5090": Gpu(32, 210, 105),
    "cpu": Gpu(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, math.nan, math.nan),
}
"""From NVIDIA's data sheets (SXM boards where there are) and, for the RTX ones, its architecture papers. "cpu" is this
machine, whose rate is not known."""


class Setting(NamedTuple):
    """An engine's setting and a micro-batch (samples)."""

    zero_stage: int
    precision: str
    checkpointing: bool
    micro_batch: int


class Plan:
    """A UM3 config on `devices` GPUs of one kind.

    Raises:
        UserError: a batch that does not divide, or a base whose shape is not known.
    """

    def __init__(self, config: UM3Config, *, devices: int, gpu: str):
        if config.loop.batch_size % devices:
            raise UserError(
                f"batch_size {config.loop.batch_size} does not divide over {devices} GPUs; change one of them"
            )
        self.config, self.devices, self.gpu, self.on_cpu = config, devices, GPUS[gpu], gpu == "cpu"
        self.share = config.loop.batch_size // devices
        self.objective, self.ids = build_objective(config)
        self.model: PreTrainedModel = self.objective.model
        self.parameters = [parameter.numel() for parameter in self.objective.parameters()]
        embedding: Any = self.model.get_input_embeddings()
        rows = {embedding.weight, self.model.lm_head.weight}  # one where they are tied
        self.head: int = self.model.lm_head.weight.numel()
        self.matrices = sum(self.parameters) - sum(weight.numel() for weight in rows)
        self.kinds = _kinds(config, ids=self.ids)
        self.tracers: dict[str, Tracer] = {}
        self.traces: dict[Setting, Trace] = {}

    def lines(self) -> Iterator[tuple[Setting, "Usage", bool]]:
        """Every ZeRO stage that takes this optimizer, with and without activation checkpointing: the largest
        micro-batch that fits, or else one sample; what it takes; and whether it fits."""
        for stage, checkpointing in itertools.product((0, 1, 2, 3), (False, True)):
            engine = self._engine(stage)
            if engine is None:
                continue
            for micro_batch in self.micro_batches():
                setting = Setting(stage, engine.precision, checkpointing, micro_batch)
                found = self.usage(setting)
                if fits := self.fits(found):
                    break
            yield setting, found, fits

    def micro_batches(self) -> list[int]:
        """Sizes that divide a device's share of the batch, the config's at most, from the largest on."""
        most = self.config.loop.micro_batch_size or self.share
        return [size for size in range(min(most, self.share), 0, -1) if self.share % size == 0]

    def own(self) -> Setting | None:
        """The config's own setting; None where its engine or batch is refused."""
        engine, micro_batch = self.config.engine, self.config.loop.micro_batch_size or self.share
        allowed = self._engine(engine.zero_stage)
        if allowed is None or allowed.precision != self._precision() or self.share % micro_batch:
            return None
        return Setting(engine.zero_stage, allowed.precision, engine.activation_checkpointing, micro_batch)

    def usage(self, setting: Setting) -> "Usage":
        """Memory of one device."""
        from train.plan.memory import Layout, usage

        engine, optimizer = self.config.engine, self.config.optimizer
        layout = Layout(
            zero_stage=setting.zero_stage,
            devices=self.devices,
            parameters=sum(self.parameters),
            largest=max(self.parameters),
            head=self.head,
            weight_bytes=2 if setting.precision == "bf16-true" else 4,
            bucket_elements=engine.bucket_elements,
            average=optimizer.ema_decay > 0,
            fused=engine.fused_kernels == "auto" and optimizer.kind == "adamw" and not self.on_cpu,
            offload=engine.offload_optimizer and setting.zero_stage > 0,
            accumulates=setting.micro_batch < self.share,
            on_cpu=self.on_cpu,
        )
        return usage(layout, self._trace(setting))

    def fits(self, found: "Usage") -> bool:
        """Whether a GPU holds it with a tenth to spare."""
        return found.total <= (1 - KEPT_FREE) * self.gpu.memory_gib * GIB

    def step_seconds(self, setting: Setting, *, mfu: float) -> float:
        """Time of a step at this utilisation; nan where the device's rate is not known."""
        model, again = self.step_flops(checkpointing=setting.checkpointing)
        rate = self.gpu.float32_tflops if setting.precision == "fp32" else self.gpu.bf16_tflops
        return (model + again) / (self.devices * rate * 1e12 * mfu)

    def step_tokens(self) -> tuple[float, float]:
        """Ids in the rows of a step, padding included, and without it."""
        batch = self.config.loop.batch_size
        own = batch * sum(share * len(row.input_ids) for share, row in self.kinds)
        if self.config.data.packing == "documents":
            return own, own
        return batch * float(max(len(row.input_ids) for _, row in self.kinds)), own

    def step_flops(self, *, checkpointing: bool) -> tuple[float, float]:
        """Model FLOPs of a step, and those of what is computed again."""
        config, batch = self.model.config, self.config.loop.batch_size
        tokens, _ = self.step_tokens()
        packed = self.config.data.packing == "documents"
        widest = max(len(row.input_ids) for _, row in self.kinds)
        lengths = [len(row.input_ids) if packed else widest for _, row in self.kinds]
        pairs = batch * sum(share * length**2 for (share, _), length in zip(self.kinds, lengths, strict=True))
        heads = config.num_attention_heads * config.head_dim
        body = 2.0 * self.matrices * tokens + 4.0 * config.num_hidden_layers * heads * pairs
        halves = self.ids.text_vocab_size, self.ids.visual_vocab_size
        if self.config.loss.mode == "joint":
            halves = (sum(halves),) * 2
        head = 0.0
        for share, row in self.kinds:
            visual = int((row.targets & (row.input_ids >= self.ids.text_vocab_size)).sum())
            text = int(row.targets.sum()) - visual
            head += 2.0 * batch * share * config.hidden_size * (text * halves[0] + visual * halves[1])
        return 3 * (body + head), head + (body if checkpointing else 0)

    def _engine(self, zero_stage: Any) -> EngineConfig | None:
        """The config's engine at this stage, its weights in float32 where bf16 needs ZeRO; None where it is refused."""
        from train.engine import check_engine

        precision = self._precision()
        if precision == "bf16-true" and zero_stage == 0:
            precision = "bf16-mixed"
        engine = replace(self.config.engine, zero_stage=zero_stage, precision=precision, offload_optimizer=False)
        try:
            check_engine(engine, optimizer=self.config.optimizer)
        except UserError:
            return None
        return engine

    def _precision(self) -> Any:
        asked = self.config.engine.precision
        return asked if asked != "auto" else "float32" if self.on_cpu else "autocast"

    def _trace(self, setting: Setting) -> "Trace":
        from train.plan.memory import Tracer

        key = setting._replace(zero_stage=0)
        if key not in self.traces:
            if setting.precision not in self.tracers:
                objective, _ = build_objective(self.config)
                self.tracers[setting.precision] = Tracer(
                    objective, body=objective.model.model, precision=setting.precision
                )
            tracer = self.tracers[setting.precision]
            switch = "enable" if setting.checkpointing else "disable"
            getattr(tracer.objective.model, f"gradient_checkpointing_{switch}")()
            rows = self._micro_batch(setting.micro_batch)
            shares = {0.0, 1.0, 1 / self.devices}
            self.traces[key] = tracer.trace(rows.input_ids_BT, rows.target_mask_BT, shares=shares)
        return self.traces[key]

    def _micro_batch(self, size: int) -> "Rows":
        """The rows of `size` samples of the mix, the first kind making up for what does not come out even."""
        from data_mix.batches.packing import lay_out

        counts = [round(share * size) for share, _ in self.kinds[1:]]
        samples: list[Row] = [self.kinds[0].row] * (size - sum(counts))
        for kind, count in zip(self.kinds[1:], counts, strict=True):
            samples += [kind.row] * count
        packed = self.config.data.packing == "documents"
        return lay_out(samples, seq_len=self.config.data.seq_len, packed=packed, pad_id=self.ids.pad_id)


class Kind(NamedTuple):
    """A sample of a task, and the task's share of the batch once the mix has calmed down."""

    share: float
    row: "Row"


def _kinds(config: UM3Config, *, ids: "UnifiedVocabulary") -> list[Kind]:
    """The commonest first; text fills its rows, captions are of middling length."""
    from data_mix.batches.schedule import Schedule
    from um3.model.sequences import image_to_text_row, text_row, text_to_image_row

    data = config.data
    visual = [ids.text_vocab_size] * ids.image_tokens
    other = next(each for each in range(ids.text_vocab_size) if each not in (ids.bos_id, ids.pad_id))
    room = data.seq_len - ids.image_tokens - 4  # bos, the image's marks, eos
    caption = [other] * max(1, min(CAPTION_TOKENS, room))
    text = [other] * ((data.text_seq_len or data.seq_len) - 2)
    rows = {
        "text": lambda: text_row(text, ids=ids),
        "i2t": lambda: image_to_text_row(visual, caption, ids=ids, supervision=data.supervision),
        "t2i": lambda: text_to_image_row(caption, visual, ids=ids, supervision=data.supervision),
    }
    shares = Schedule(data.mix).proportions(data.mix.calm_down_steps)
    return sorted((Kind(share, rows[task]()) for task, share in shares.items() if share), key=lambda kind: -kind.share)


def build_objective(config: UM3Config) -> tuple["UM3Objective", "UnifiedVocabulary"]:
    """What trains, on the meta device, and its ids.

    Raises:
        UserError: the shape of the base is not to be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.recipes.um3 import UM3Objective
    from um3.model.bit_embeddings import SharedBits
    from um3.model.configuration import is_um3
    from um3.model.extend import extend_model
    from um3.model.language_model import build_model
    from um3.model.vocabulary import UnifiedVocabulary

    base = config.model.base_model
    with torch.device("meta"):
        if is_um3(base):
            stored = AutoConfig.from_pretrained(base, trust_remote_code=False)
            ids, model = UnifiedVocabulary.from_dict(stored.um3), AutoModelForCausalLM.from_config(stored)
        elif base:
            shape = _base_config(base)
            ids = _ids(config, text_vocab_size=shape.vocab_size + 2)
            model = extend_model(AutoModelForCausalLM.from_config(shape), ids=ids, qk_norm=config.model.qk_norm)
        else:
            ids = _ids(config, text_vocab_size=config.vocabulary.text_vocab_size)
            model = build_model(config.model, ids=ids)
        bits = SharedBits(ids, model_config=model.config) if config.vocabulary.bit_embeddings else None
        packed = config.data.packing == "documents"
        return UM3Objective(model, ids=ids, loss=config.loss, bits=bits, packed=packed), ids


def _base_config(base: str) -> "PreTrainedConfig":
    from transformers import LlamaConfig

    from um3.model.extend import read_base_config

    return LlamaConfig(**KNOWN_BASES[base]) if base in KNOWN_BASES else read_base_config(base)


def _ids(config: UM3Config, *, text_vocab_size: int) -> "UnifiedVocabulary":
    """Ids of the right number; which of the text entries are special does not matter here."""
    from tokenizer.configuration import QLIPConfig
    from um3.model.extend import load_base_tokenizer
    from um3.model.vocabulary import UnifiedVocabulary

    vocabulary = config.vocabulary
    patches = max(1, min(PATCHES, (config.data.seq_len - 5) // vocabulary.subtokens))
    if vocabulary.tokenizer:
        text_vocab_size = len(load_base_tokenizer(vocabulary.tokenizer)[0])
    if (Path(config.visual_tokenizer) / "config.json").is_file():
        vision = QLIPConfig.from_pretrained(config.visual_tokenizer).vision_tower
        patches = (vision.image_size // vision.patch_size) ** 2
    marks = {name: index for index, name in enumerate(("bos_id", "eos_id", "pad_id"))}
    return UnifiedVocabulary(
        text_vocab_size=text_vocab_size,
        subtokens=vocabulary.subtokens,
        bits_per_subtoken=vocabulary.bits_per_subtoken,
        num_patches=patches,
        begin_of_image_id=text_vocab_size - 2,
        end_of_image_id=text_vocab_size - 1,
        **marks,
    )


PARTS = ("weights", "optimizer", "gradients", "activations", "working", "buffers")


def main(arguments: Sequence[str]) -> None:
    """Print the table, and last what the config's own setting takes."""
    config, options = _options(arguments)
    # The name that the recipes call too; transformers 5 keeps it beside a new one.
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_", category=FutureWarning)
    plan = Plan(config, devices=options.gpus, gpu=options.gpu)
    rows, own = plan.step_tokens()
    print(
        f"{sum(plan.parameters) / 1e9:.3f}e9 parameters on {options.gpus} x {options.gpu} of {plan.gpu.memory_gib:.0f} "
        f"GiB, {KEPT_FREE:.0%} of it kept free. A step: {config.loop.batch_size} samples, {rows:,.0f} tokens "
        f"({1 - own / rows:.0%} padding), {plan.step_flops(checkpointing=False)[0] / 1e15:.3g} PFLOP at "
        f"{options.mfu:.0%} of the peak; {config.loop.max_steps:,} steps."
    )
    heads = ["ZeRO", "precision", "checkpointing", "micro-batch", *PARTS, "GiB", "moment", "fits", "tokens/s", "days"]
    table = [heads, *(_cells(plan, *line, mfu=options.mfu) for line in plan.lines())]
    _print_table(table)
    if (setting := plan.own()) is None:
        print("The config's own setting is none that can run; change engine or loop.micro_batch_size.")
        return
    found = plan.usage(setting)
    print("The config's own setting:")
    _print_table([heads, _cells(plan, setting, found, plan.fits(found), mfu=options.mfu)])


def _cells(plan: Plan, setting: Setting, found: "Usage", fits: bool, *, mfu: float) -> list[str]:
    seconds = plan.step_seconds(setting, mfu=mfu)
    tokens, _ = plan.step_tokens()
    days = seconds * plan.config.loop.max_steps / 86_400
    return [
        str(setting.zero_stage),
        setting.precision,
        "yes" if setting.checkpointing else "no",
        str(setting.micro_batch),
        *(f"{getattr(found, part) / GIB:.2f}" for part in PARTS),
        f"{found.total / GIB:.2f}",
        found.moment,
        "yes" if fits else "NO",
        *(("-", "-") if math.isnan(days) else (f"{tokens / seconds:,.0f}", f"{days:.3g}")),
    ]


def _print_table(table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def _options(arguments: Sequence[str]) -> tuple[UM3Config, argparse.Namespace]:
    parser = command_parser("python -m train plan", str(__doc__), config="required")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in all (default 8)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default h100)")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"share of the GPUs' rate that is used (default {MFU})")
    config, options = read_config(UM3Config, parser, section="um3", arguments=arguments)
    if options.gpu not in GPUS:
        raise UserError(f"--gpu '{options.gpu}' is not known; use one of {', '.join(GPUS)}")
    if options.gpus < 1:
        raise UserError(f"--gpus is {options.gpus}; it must be at least 1")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu is {options.mfu}; it must be above 0 and at most 1")
    return config, options
