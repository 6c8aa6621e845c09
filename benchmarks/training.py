"""`python -m benchmarks training`: time, memory and model FLOPs utilisation of a step of stage 1 and of stage 2.

A few steps of the real `python -m train` in a temporary folder; the first are warm-up and do not count. A step's time
is that between two rows of metrics.jsonl, so that reading images, logging and the optimizer are in it. Stage 2 runs
with all its terms. Utilisation is model FLOPs (`benchmarks/flops.py`) as a share of what large matrix products in the
same precision reach in as many processes of as many threads, or of `--peak-tflops`.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.peak import Peak, measure_peak
from benchmarks.runs import Run, add_training_options, check_positive, provenance, temporary_folder, train_phase
from train.config import Stage1Config, Stage2Config
from um3.core.config import load_config
from um3.core.errors import UserError

STAGES: dict[str, type[Any]] = {"stage1": Stage1Config, "stage2": Stage2Config}
LISTENING = ("loss.adversarial_start_step=0",)
TEXT_IMAGES = 512
"""At most so many captions tell how long a batch's text is."""


def main(arguments: Sequence[str]) -> None:
    """Run the stages, then print one line for each and all numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__)
    add_training_options(parser)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--steps", type=int, default=10, help="steps that count (default 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--processes", type=int, default=1, help="training processes (default 1)")
    parser.add_argument("--peak-tflops", type=float, help="the machine's TFLOP/s in all, in place of a measured one")
    options = parser.parse_intermixed_args(arguments)
    check_positive(options, "steps", "warmup", "processes")
    if options.peak_tflops is not None and options.peak_tflops <= 0:
        raise UserError(f"--peak-tflops is {options.peak_tflops}; it must be above 0")
    if options.stages == ["stage2"] and not options.tokenizer:
        raise UserError("stage 2 alone needs a tokenizer to start from; give --tokenizer FOLDER, or run stage1 too")
    with temporary_folder() as name:
        runs = _run_stages(options, folder=Path(name))
        numbers = {stage: _report(stage, run, options=options) for stage, run in runs.items()}
        print(json.dumps(numbers | provenance(*runs.values())))


def _run_stages(options: argparse.Namespace, *, folder: Path) -> dict[str, Run]:
    """Every stage that was asked for, before torch is imported here (`run_apart`)."""
    settings = {"stage1": (), "stage2": (*LISTENING, f"init_from={options.tokenizer or folder / 'stage1/model'}")}
    steps = options.warmup + options.steps
    return {
        stage: train_phase(stage, options=options, steps=steps, folder=folder, settings=settings[stage])
        for stage in STAGES
        if stage in options.stages
    }


def _report(stage: str, run: Run, *, options: argparse.Namespace) -> dict[str, Any]:
    """Print a stage's line; returns its numbers (seconds, GiB, FLOP)."""
    from train.engine import precision_of

    config = load_config(STAGES[stage], path=run.folder / "config.yaml")
    loop, precision = config.loop, precision_of(config.engine)
    times = step_seconds(run.rows)[options.warmup - 1 :]
    images_per_s = loop.batch_size / fmean(times)
    flops = _image_flops(config, run)
    if options.peak_tflops:
        peak = Peak(options.peak_tflops * 1e12, "given")
    else:
        peak = measure_peak(precision=precision, processes=options.processes, threads=loop.num_threads)
    total = sum(flops.values())
    used = total * images_per_s / peak.flops
    print(
        f"{stage}: {fmean(times):.3g} s a step of {loop.batch_size} images, {images_per_s:.4g} images/s; "
        f"{run.peak_kind} {run.peak_gib:.2f} GiB; {total / 1e9:.3g} GFLOP an image: {used:.1%} of "
        f"{peak.flops / 1e12:.3g} TFLOP/s ({peak.how})"
    )
    numbers = {"step_s": times, "batch_size": loop.batch_size, "images_per_s": images_per_s, "precision": precision}
    numbers |= {"processes": options.processes, "peak_gib": run.peak_gib, "peak_kind": run.peak_kind}
    return numbers | {"flops_per_image": flops, "peak_flops": peak.flops, "peak_how": peak.how, "utilisation": used}


def step_seconds(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of every step but the first, from rows of every step.

    `perf/steps_per_s` is the mean rate since the loop began: a step's number over it is the time on the loop's clock.
    """
    clock = [row["step"] / row["perf/steps_per_s"] for row in rows]
    return [later - earlier for earlier, later in itertools.pairwise(clock)]


def _image_flops(config: Stage1Config | Stage2Config, run: Run) -> dict[str, int]:
    """Model FLOPs of one image in a step, by network."""
    from benchmarks.flops import judge_flops, qlip_flops
    from tokenizer.configuration import QLIPConfig

    size = QLIPConfig.from_pretrained(run.folder / "model")
    if isinstance(config, Stage1Config):
        return {"qlip": qlip_flops(size, text_tokens=_text_tokens(config, run)).stage1}
    judges = judge_flops(config, image_size=size.vision_tower.image_size)
    return {"qlip": qlip_flops(size, text_tokens=0).stage2, **judges}


def _text_tokens(config: Stage1Config, run: Run) -> int:
    """Tokens of the longest caption of a micro-batch, to which the others are padded."""
    from data_mix.batches.image_batches import ImageBatches
    from tokenizer.processor import QLIPProcessor
    from train.recipes.tokenizer_setup import open_sources

    processor = QLIPProcessor.from_pretrained(run.folder / "model")
    loop, data = config.loop, config.data
    batches = ImageBatches(
        open_sources(data, size=processor.image_size, seed=loop.seed),
        weights=[source.weight for source in data.sources],
        batch_size=min(loop.micro_batch_size or loop.batch_size // run.done["processes"], TEXT_IMAGES),
        seed=loop.seed,
        caption=data.caption,
    )
    return int(processor.text(batches.batch(0).captions)["input_ids"].shape[1])
