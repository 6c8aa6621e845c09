"""`python -m train own-images --config own_images --sources LIST --out FILE`: settings for your own images.

Looks at the images and captions, runs a few steps of each phase on them, and writes a config that extends `--config`:
the size of the images, and as many steps as fit `--minutes` on this machine. `make demo DATA=...` starts with it.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
from omegaconf import OmegaConf

from data_mix.samples import Split, usable
from data_mix.sources.files import CAPTION_SUFFIXES, source_kind
from data_mix.sources.image_folder import FolderImages
from data_mix.sources.image_sources import ImageSourceConfig, open_image_source
from data_mix.sources.images import ImageReader
from data_mix.sources.presets import apply_preset
from train.phase import CONFIGS
from train.settings.tokenizer import Stage1Config
from um3.core.commands import command_parser, find_config, positive, read_config, settings_of
from um3.core.config import load_config, to_yaml
from um3.core.errors import UserError, last_error
from um3.core.files import folder_lock, read_json, walk_files, write_text
from um3.core.images import SUFFIXES
from um3.core.metrics import read_metrics
from um3.core.text import printable

SHARES = {"stage1": 0.45, "stage2": 0.1, "um3": 0.35}
"""Of the minutes; the rest is for encoding, evaluation and the report."""
MOST_READS = {"stage1": 400, "stage2": 60, "um3": 200}
"""More often than this no image is read: a small set is learned by heart before its minutes are over."""
REHEARSED, MEASURED = 10, 6
"""Steps of a rehearsal, and how many of the last ones are timed."""
FEWEST_STEPS = 20
LOOKED_AT = 256
"""Images that are read for their sizes."""
COMPARED = 20_000
"""Images and captions, from the first on, that are compared with each other."""
FEW_VAL, MOST_VAL_FRACTION = 20, 0.2
FEWEST_VAL = 2
"""Validation images that the evaluation needs."""
MOST_EXCLUDED = 2_000
"""Copies of training images whose keys are written into the config."""
LONG = 4.0
"""Ratio of the sides above which most of an image is cut off."""
FEW_IMAGES = 500
SMALL_SIDE, LARGE_SIDE, LONG_MINUTES = 48, 112, 240
"""Images below the first are read at 32 pixels, those from the second on at 128 if there is so much time, else 64."""
PATCH, SUBTOKENS, CAPTION_TOKENS = 8, 2, 48
"""Of configs/own_images.yaml; and room for a caption and the marks of an image."""
BATCH_SIZES = {"stage1": 32, "stage2": 16, "um3": 24}
"""If there are so many images."""


class Look(NamedTuple):
    """What was seen of a source: it, with enough of its images for validation; the number of its training images; the
    median of the shorter sides; and lines to print."""

    source: ImageSourceConfig
    num_train: int
    short_side: int
    lines: list[str]


class Rehearsal(NamedTuple):
    """What a few steps of a phase cost: seconds to start and end, seconds a step, and memory."""

    start_s: float
    step_s: float
    gib: float


def main(arguments: Sequence[str]) -> None:
    """Write the config, unless it exists, and print what was chosen.

    Raises:
        UserError: the images cannot be read or are too few, or a phase fails on them.
    """
    parser = command_parser("python -m train own-images", "Choose settings for your own images.", config="required")
    parser.add_argument(
        "--sources", required=True, help="the images, as in data.sources: '[{name: data, path: FOLDER}]'"
    )
    parser.add_argument("--out", required=True, help="the config that is written, such as runs/mine/own_images.yaml")
    parser.add_argument("--minutes", type=float, default=60, help="minutes of the whole pipeline (default 60)")
    parser.add_argument("--processes", type=positive, default=1, help="training processes (default 1)")
    options = parser.parse_intermixed_args(arguments)
    images = f"data.sources={options.sources}"
    config, _ = read_config(Stage1Config, parser, section="stage1", arguments=[*arguments, "--shared", images])
    if options.minutes <= 0:
        raise UserError(f"--minutes {options.minutes:g} (make: MINUTES=) is not a number above 0")
    out, sources = Path(options.out), config.data.sources
    if out.exists():
        print(f"{out} holds the settings; delete it to choose again")
        return
    with folder_lock(out.parent):
        looks = [look(source, size=config.model.image_size) for source in sources]
        print("\n".join(printable(line) for seen in looks for line in seen.lines), flush=True)
        settings = _sized(looks, minutes=options.minutes, processes=options.processes)
        rehearsals = _rehearse(settings, options=options)
        num_images = sum(seen.num_train for seen in looks)
        for phase, share in SHARES.items():
            cost, batch_size = rehearsals[phase], settings[phase]["loop"]["batch_size"]
            reads = num_images * MOST_READS[phase] / batch_size
            steps = min((60 * share * options.minutes - cost.start_s) / cost.step_s, reads)
            settings[phase] = _merged(settings[phase], _schedule(phase, steps=max(FEWEST_STEPS, int(steps))))
        _write_config(out, settings, base=find_config(options.config))
    print("\n".join(_table(out, rehearsals=rehearsals, overrides=options.overrides)))
    print(f"settings: {out}; later targets of this run read them with CONFIG={out}")


def look(source: ImageSourceConfig, *, size: int) -> Look:
    """Count the images of both splits; measure sizes, captions and copies on the first ones."""
    source = _with_validation(source, size=size)
    splits: tuple[Split, ...] = ("train", "val") if source.val_fraction else ("train",)
    readers = {split: open_image_source(source, split=split, size=size, seed=0) for split in splits}
    counts = ", ".join(f"{len(reader):,} {split}" for split, reader in readers.items())
    lines, train, side = [f"images of '{source.name}': {counts}"], readers["train"], size
    if isinstance(train, ImageReader):
        numbers = np.linspace(0, len(train) - 1, min(LOOKED_AT, len(train))).astype(int).tolist()
        sizes = list(usable(lambda index: train.original(index).size, numbers))
        if not sizes:
            raise UserError(f"{source.where}: none of {len(numbers)} images can be read; convert them to PNG or JPEG")
        side = int(median(min(pair) for pair in sizes))
        lines.append(f"  shorter side: {side} pixels (median of {len(sizes)})")
        if long := sum(max(pair) > LONG * min(pair) for pair in sizes):
            lines.append(f"  {long} of {len(sizes)} are over {LONG:.0f}:1 long; only their centre is read")
        lines += _other_files(source) if isinstance(train, FolderImages) else []
        lines += _captions(train) if source.has_captions else []
        can_exclude = not source.stream and source_kind(apply_preset(source)) != "coco"
        copies, said = _copies(readers, can_exclude=can_exclude)
        source, lines = replace(source, exclude=[*source.exclude, *copies]), lines + said
    if len(train) < FEW_IMAGES:
        lines.append("  these are few images: expect copies of them, and little of new ones")
    return Look(source, len(train), side, lines)


def _with_validation(source: ImageSourceConfig, *, size: int) -> ImageSourceConfig:
    """The source with a larger share of validation, if its own leaves too few images for a measurement."""
    if not source.val_fraction:
        return source
    whole = open_image_source(replace(source, val_fraction=0.0), split="train", size=size, seed=0)
    return replace(source, val_fraction=max(source.val_fraction, min(FEW_VAL / len(whole), MOST_VAL_FRACTION)))


def _other_files(source: ImageSourceConfig) -> Iterator[str]:
    read = (*SUFFIXES, *CAPTION_SUFFIXES, ".txt")
    others = Counter(path.suffix for path in walk_files(source.path) if not path.name.lower().endswith(read))
    if others:
        kinds = ", ".join(f"{suffix or 'without a suffix'} ({number:,})" for suffix, number in others.most_common(5))
        yield f"  other files, which are not read: {kinds}"


def _captions(reader: ImageReader) -> Iterator[str]:
    captions = [texts[0] for texts in usable(reader.captions_of, range(min(COMPARED, len(reader))))]
    counts = Counter(captions)
    if not counts:
        return
    words = median(len(caption.split()) for caption in captions)
    yield f"  captions: {len(counts):,} different ones of {len(captions):,}, of {words:.0f} words (median)"
    most, number = counts.most_common(1)[0]
    if len(counts) == 1 < len(captions):
        yield f"  every caption is '{most[:60]}': nothing can be learned from it; describe what differs"
    elif number > len(captions) / 4:
        yield f"  {number:,} captions are '{most[:60]}'"
    if foreign := sum(not caption.isascii() for caption in counts):
        yield f"  {foreign:,} captions have letters beyond ASCII, which is fine: the vocabulary is learned from them"


def _copies(readers: dict[Split, Any], *, can_exclude: bool) -> tuple[list[str], list[str]]:
    """The keys of validation images that are training images too, if they can be left out; and lines to print."""
    seen = {}
    for split, reader in readers.items():
        read = usable(reader.__getitem__, range(min(COMPARED, len(reader))))
        seen[split] = [(sample.key, hash(sample.image_HWC.tobytes())) for sample in read]
    train, val, lines = {digest for _, digest in seen["train"]}, seen.get("val", []), list[str]()
    if repeated := len(seen["train"]) - len(train):
        lines.append(f"  {repeated:,} training images are copies of others")
    copies = [key for key, digest in val if digest in train]
    if not copies:
        return [], lines
    line = f"  {len(copies):,} of {len(val):,} validation images are copies of training images"
    if len(val) - len(copies) < FEWEST_VAL:
        return [], [*lines, f"{line}; add images of other things"]
    if not can_exclude or len(copies) > MOST_EXCLUDED:
        return [], [*lines, f"{line}; remove them from the data"]
    return copies, [*lines, f"{line}, which are left out"]


def _sized(looks: Sequence[Look], *, minutes: float, processes: int) -> dict[str, dict[str, Any]]:
    """The settings that follow from the images alone, by section."""
    short_side = min(seen.short_side for seen in looks)
    size = 32 if short_side < SMALL_SIDE else 128 if short_side >= LARGE_SIDE and minutes >= LONG_MINUTES else 64
    images = [_non_defaults(seen.source) for seen in looks]
    least = min(seen.num_train for seen in looks)
    each = {phase: min(most, least) // processes for phase, most in BATCH_SIZES.items()}
    batch_sizes = {phase: processes * max(1, of_process) for phase, of_process in each.items()}
    grid = size // PATCH
    return {
        "stage1": {
            "loop": {"batch_size": batch_sizes["stage1"]},
            "model": {"image_size": size, "rope_pretrained_grid": grid},
            "data": {"sources": images},
        },
        "stage2": {"loop": {"batch_size": batch_sizes["stage2"]}, "data": {"sources": images}},
        "codes": {"images": images},
        "um3": {
            "loop": {"batch_size": batch_sizes["um3"]},
            "data": {"seq_len": SUBTOKENS * grid**2 + CAPTION_TOKENS},
            "model": {"max_position_embeddings": max(256, SUBTOKENS * grid**2 + CAPTION_TOKENS)},
        },
        "eval": {"images": images},
    }


def _non_defaults(source: ImageSourceConfig) -> dict[str, Any]:
    default = dataclasses.asdict(ImageSourceConfig())
    return {name: value for name, value in dataclasses.asdict(source).items() if value != default[name]}


def _schedule(phase: str, *, steps: int) -> dict[str, Any]:
    """The settings of a phase that follow from its number of steps."""
    quarter = max(10, steps // 40 * 10)  # a multiple of loop.log_every_steps
    warmup = {"warmup_steps": min(50, steps // 10)}
    settings = {"loop": {"max_steps": steps, "save_every_steps": quarter}, "optimizer": warmup}
    if phase == "um3":
        mix = {"calm_down_steps": steps // 9}
        return settings | {"text_validation": {"every_steps": quarter}, "data": {"mix": mix}}
    settings["validation"] = {"every_steps": quarter}
    if phase == "stage2":
        settings |= {"discriminator_optimizer": warmup, "loss": {"adversarial_start_step": steps * 2 // 5}}
    return settings


def _rehearse(settings: dict[str, dict[str, Any]], *, options: argparse.Namespace) -> dict[str, Rehearsal]:
    """Run REHEARSED steps of every phase that trains, each on what the one before it wrote."""
    with tempfile.TemporaryDirectory(dir=Path(options.out).parent, prefix="rehearsal-") as place:
        config = Path(place, "config.yaml")
        _write_config(config, settings, base=find_config(options.config))
        shared = ["--config", str(config), "--shared", *options.overrides]
        inputs = {
            "stage1": [],
            "stage2": [f"init_from={place}/stage1/model"],
            "um3": [f"visual_tokenizer={place}/stage2/model", f"data.codes={place}/codes"],
        }
        costs = {}
        for phase, inputs_of in inputs.items():
            print(f"rehearsal of {phase}: {REHEARSED} steps", flush=True)
            if phase == "um3":
                to = [f"visual_tokenizer={place}/stage2/model", f"output_dir={place}/codes", f"limit={LOOKED_AT}"]
                _run(["data_mix", "encode", *shared, *to], what="encoding")
            steps = [f"loop.max_steps={REHEARSED}", f"loop.save_every_steps={REHEARSED}", "loop.log_every_steps=1"]
            command = ["train", phase, "--processes", str(options.processes), *shared, *inputs_of, *steps]
            began = time.monotonic()
            _run([*command, f"loop.output_dir={place}/{phase}"], what=phase)
            seconds = time.monotonic() - began
            clock = [row["step"] / row["perf/steps_per_s"] for row in read_metrics(f"{place}/{phase}/metrics.jsonl")]
            step_s = (clock[-1] - clock[-1 - MEASURED]) / MEASURED
            gib = read_json(f"{place}/{phase}/done.json")["peak_memory_gib"]
            costs[phase] = Rehearsal(seconds - step_s * REHEARSED, step_s, gib)
        return costs


def _run(command: Sequence[str], *, what: str) -> None:
    """Run `python -m COMMAND`; UserError with its last error line if it fails."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{what}: {last_error(done.stderr, code=done.returncode)}")


def _write_config(path: Path, settings: dict[str, Any], *, base: Path) -> None:
    """Write the settings as a YAML file that extends `base`."""
    write_text(path, to_yaml({"base": str(base.resolve()), **settings}))


def _merged(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(settings, others)))


def _table(path: Path, *, rehearsals: dict[str, Rehearsal], overrides: Sequence[str]) -> list[str]:
    """What each phase will do, with the settings of the command line."""
    lines = ["", "| phase | steps | images a step | s a step | minutes | GiB |", "|---|---|---|---|---|---|"]
    for phase, cost in rehearsals.items():
        own = settings_of(CONFIGS[phase], overrides, section=phase)
        config = load_config(CONFIGS[phase], path=path, section=phase, overrides=own)
        steps, batch_size = config.loop.max_steps, config.loop.batch_size
        minutes = (cost.start_s + steps * cost.step_s) / 60
        lines.append(f"| {phase} | {steps:,} | {batch_size} | {cost.step_s:.2f} | {minutes:.0f} | {cost.gib:.1f} |")
        if phase == "stage1":
            size, model = config.model.image_size, config.model
            patches = (size // model.patch_size) ** 2
            lines.insert(0, f"an image of {size} x {size} pixels becomes {patches} codes of {model.bits} bits")
    return lines
