"""`python -m benchmarks training`: time, memory and model FLOPs utilisation of a step of stages 1 and 2.

Runs a few steps of `python -m train` in a temporary folder; the first are warm-up. A step's time is that between two
rows of metrics.jsonl, so it includes reading images, logging and the optimizer. Stage 2 runs with all its losses.
Utilisation is model FLOPs as a share of what large matrix products reach in the same precision in as many processes,
or of --peak-tflops.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import harness
from train.settings.tokenizer import Stage1Config, Stage2Config
from um3.core.config import load_config
from um3.core.errors import UserError

STAGES: dict[str, type[Any]] = {"stage1": Stage1Config, "stage2": Stage2Config}
CAPTIONS = 512
"""At most so many captions decide the text length of a batch."""


def main(arguments: Sequence[str]) -> None:
    """Run the stages, print one line for each, then all numbers as JSON."""
    parser = harness.benchmark_parser("training", __doc__)
    harness.add_training_options(parser)
    harness.add_step_options(parser, steps=10, warmup=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--processes", type=harness.positive, default=1, help="training processes (default 1)")
    options = parser.parse_intermixed_args(arguments)
    if options.stages == ["stage2"] and not options.tokenizer:
        raise UserError("stage 2 alone needs a tokenizer to start from; pass --tokenizer FOLDER, or run stage1 too")
    with harness.temporary_folder() as name:
        initial = options.tokenizer or f"{name}/stage1/model"
        settings = {"stage1": [], "stage2": ["loss.adversarial_start_step=0", f"init_from={initial}"]}
        how: Any = {"options": options, "steps": options.warmup + options.steps, "folder": Path(name)}
        stages = [stage for stage in STAGES if stage in options.stages]
        runs = {stage: harness.train_phase(stage, settings=settings[stage], **how) for stage in stages}
        numbers = {stage: _report(stage, run, options=options) for stage, run in runs.items()}
        print(json.dumps(numbers | runs[stages[0]].provenance))


def _report(stage: str, run: harness.TrainingRun, *, options: argparse.Namespace) -> dict[str, Any]:
    from tokenizer.configuration import read_qlip_config
    from train.engine import precision_of
    from train.plan.image_flops import stage1_flops, stage2_flops

    config = load_config(STAGES[stage], path=run.folder / "config.yaml")
    loop, precision = config.loop, precision_of(config.engine)
    times, cpu_times = (run.step_seconds(warmup=options.warmup, cpu=cpu) for cpu in (False, True))
    images_per_s = loop.batch_size / fmean(times)
    qlip_config = read_qlip_config(run.folder / "model")
    if stage == "stage1":
        flops = stage1_flops(qlip_config, text_tokens=_text_tokens(config, run))
    else:
        flops = stage2_flops(qlip_config, config)
    how: Any = {"processes": options.processes, "threads": loop.num_threads, "tflops": options.peak_tflops}
    peak = harness.machine_peak(precision=precision, **how)
    utilisation = sum(flops.values()) * images_per_s / peak.flops
    print(
        f"{stage}: {fmean(times):.3g} s a step of {loop.batch_size} images, {images_per_s:.4g} images/s, "
        f"{fmean(cpu_times):.3g} s of CPU time in the first process; "
        f"{run.peak_kind} {run.peak_gib:.2f} GiB; {sum(flops.values()) / 1e9:.3g} GFLOP an image: {utilisation:.1%} "
        f"of {peak.flops / 1e12:.3g} TFLOP/s ({peak.how})"
    )
    return {
        **{
            "step_s": times,
            "step_cpu_s": cpu_times,
            "batch_size": loop.batch_size,
            "images_per_s": images_per_s,
            "precision": precision,
        },
        **{"processes": options.processes, "peak_gib": run.peak_gib, "peak_kind": run.peak_kind},
        **{"flops_per_image": flops, "peak_flops": peak.flops, "peak_how": peak.how, "utilisation": utilisation},
    }


def _text_tokens(config: Stage1Config, run: harness.TrainingRun) -> int:
    """Tokens of the longest caption of a micro-batch, to which the others are padded."""
    from data_mix.batches.image_batches import ImageBatches
    from tokenizer.processor import QLIPProcessor
    from train.recipes.tokenizer_setup import open_sources

    processor = QLIPProcessor.from_pretrained(run.folder / "model")
    loop, data = config.loop, config.data
    batches = ImageBatches(
        open_sources(data, size=processor.image_size, seed=loop.seed),
        weights=[source.weight for source in data.sources],
        batch_size=min(loop.micro_batch_size or loop.batch_size // run.done["processes"], CAPTIONS),
        seed=loop.seed,
        caption=data.caption,
    )
    return int(processor.text(batches.batch(0).captions)["input_ids"].shape[1])
