"""`make mix-preview`: draw the scheduled data mix."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_mix.batches.config import DataConfig
from data_mix.batches.mix_figure import draw_mix
from data_mix.batches.schedule import TASKS, Schedule
from data_mix.order import fixed_shares
from um3.core.commands import command_parser, read_config
from um3.core.errors import UserError
from um3.core.files import atomic_file


@dataclass
class PreviewConfig:
    """The keys of a UM3 training config that the mix depends on; of `loop` only max_steps and batch_size are read."""

    data: DataConfig = field(default_factory=DataConfig)
    loop: dict[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> None:
    """Draw the mix of a UM3 config."""
    parser = command_parser("python -m data_mix mix-preview", "Draw the data mix of a UM3 config.", config="required")
    parser.add_argument("--out", required=True, help="PNG to write")
    config, options = read_config(PreviewConfig, parser, section="um3", arguments=arguments, partial=True)
    for key in ("max_steps", "batch_size"):
        if not isinstance(value := config.loop.get(key), int) or value < 1:
            raise UserError(f"{options.config} sets loop.{key} to {value}; pass loop.{key}=NUMBER, at least 1")
    steps, batch_size = config.loop["max_steps"], config.loop["batch_size"]
    schedule, shares = Schedule(config.data.mix), source_shares(config.data)
    figure = draw_mix(schedule, shares, batch_size=batch_size, steps=steps)
    with atomic_file(options.out) as partial:
        figure.savefig(partial, dpi=120, format="png")
    print(f"{options.out}: the mix of {steps} steps of {batch_size} samples")
    for key, count in schedule.due_samples(shares, batch_size=batch_size, step=steps).items():
        print(f"  {key}: {count:,.0f}")


def source_shares(config: DataConfig) -> dict[str, float]:
    """Share of each "task/source" in the samples of its task; before `make codes`, all images are one source."""
    texts = {source.name: source.weight for source in config.texts} or {"none": 1.0}
    images: Mapping[str, float] = config.image_weights
    if not images and any(Path(config.codes).glob("*.arrow")):
        from data_mix.codes.shards import shard_headers

        sizes: Counter[str] = Counter()
        for header in shard_headers(config.codes, split="train").values():
            sizes[header.source] += header.num_images
        images = dict(sorted(sizes.items()))
    shares: dict[str, float] = {}
    for task in TASKS:
        weights = texts if task == "text" else images or {"images": 1.0}
        parts = fixed_shares(list(weights.values()), of=f"{task} sources {list(weights)}")
        shares |= {f"{task}/{name}": part / sum(parts) for name, part in zip(weights, parts, strict=True)}
    return shares
