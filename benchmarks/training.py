"""`python -m benchmarks training` and `python -m benchmarks memory`: training steps of stages 1 and 2.

Both run a few steps of `python -m train` in temporary folders. training reports time, memory and model FLOPs
utilisation. The first steps are warm-up; a step's time is that between two rows of metrics.jsonl, so it includes
reading images, logging and the optimizer. Stage 2 runs with all its losses. Utilisation is model FLOPs as a share of
what large matrix products reach in the same precision in as many processes, or of --peak-tflops.

memory reports the peak memory of stage 2's step against the batch size (paper, Figure 3). Each point is in one
micro-batch in its own process: with perceptual loss and GAN, and without either network. The peak is torch's on a GPU
and resident memory, Python included, on a CPU.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import harness
from train.settings.tokenizer import Stage1Config, Stage2Config
from um3.core.commands import positive
from um3.core.config import load_config
from um3.core.errors import UserError
from um3.core.files import atomic_file, write_json

STAGES: dict[str, type[Any]] = {"stage1": Stage1Config, "stage2": Stage2Config}
CAPTIONS = 512
"""At most so many captions decide the text length of a batch."""
MEMORY_STEPS = 3
TERMS = "perceptual loss and GAN"
KINDS = {"with": ["loss.adversarial_start_step=0"], "without": ["loss.perceptual=0", "loss.adversarial=0"]}

Peaks = Mapping[str, Sequence[float | None]]
"""Peak memory (GiB) by kind, one value a batch size; None where it ran out of memory."""


def main(arguments: Sequence[str]) -> None:
    """Run the command that `arguments` starts with."""
    name, *arguments = arguments
    {"training": measure_steps, "memory": measure_memory}[name](arguments)


def measure_steps(arguments: Sequence[str]) -> None:
    """Run the stages, print one line for each, then all numbers as JSON."""
    parser = harness.benchmark_parser("training", __doc__)
    harness.add_training_options(parser)
    harness.add_step_options(parser, steps=10, warmup=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--processes", type=positive, default=1, help="training processes (default 1)")
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


def measure_memory(arguments: Sequence[str]) -> None:
    """Measure every point, print the table, and write memory.png and memory.json."""
    parser, sizes = harness.benchmark_parser("memory", __doc__), [8, 16, 32, 64]
    harness.add_training_options(parser)
    parser.add_argument("--batches", type=positive, nargs="+", default=sizes, help="default 8 16 32 64")
    parser.add_argument("--out", default="runs/benchmarks", help="folder for memory.png and memory.json")
    options = parser.parse_intermixed_args(arguments)
    batches = sorted(set(options.batches))
    with harness.temporary_folder() as name:
        if not (tokenizer := options.tokenizer):
            small = ["loop.batch_size=2", "loop.micro_batch_size=0"]
            run = harness.train_phase("stage1", options=options, steps=1, folder=Path(name), settings=small)
            tokenizer = run.folder / "model"
        runs = {kind: [_memory_run(kind, batch, tokenizer, options=options) for batch in batches] for kind in KINDS}
    finished = [run for kind_runs in runs.values() for run in kind_runs if run]
    if not finished:
        raise UserError(f"a batch of {batches[0]} images does not fit; choose a smaller batch or model")
    peaks = {kind: [run and run.peak_gib for run in kind_runs] for kind, kind_runs in runs.items()}
    print("\n".join(table(peaks, batches=batches, title=finished[0].peak_kind)))
    out = Path(options.out)
    write_json(out / "memory.json", {"batches": batches, **peaks, **finished[0].provenance})
    plot(peaks, batches=batches, title=finished[0].peak_kind, path=out / "memory.png")
    print(out / "memory.png")


def _memory_run(kind: str, batch: int, tokenizer: str, *, options: argparse.Namespace) -> harness.TrainingRun | None:
    settings = [f"init_from={tokenizer}", f"loop.batch_size={batch}", "loop.micro_batch_size=0", *KINDS[kind]]
    with harness.temporary_folder() as name:
        how: Any = {"folder": Path(name), "settings": settings, "label": f"{batch} images, {kind} {TERMS}"}
        try:
            return harness.train_phase("stage2", options=options, steps=MEMORY_STEPS, **how)
        except harness.OutOfMemory as error:
            print(error)
            return None


def table(peaks: Peaks, *, batches: Sequence[int], title: str) -> list[str]:
    """Lines of text: batch sizes down, kinds across."""
    rows = [["images", *peaks]]
    for number, batch in enumerate(batches):
        values = [kind_peaks[number] for kind_peaks in peaks.values()]
        rows.append([str(batch), *("no memory" if peak is None else f"{peak:.2f}" for peak in values)])
    return [f"{title}, GiB, with and without {TERMS}", *("".join(cell.rjust(12) for cell in row) for row in rows)]


def plot(peaks: Peaks, *, batches: Sequence[int], title: str, path: Path) -> None:
    """Write the curves to a PNG file; a curve ends where memory did."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind, kind_peaks in peaks.items():
        points = [(batch, peak) for batch, peak in zip(batches, kind_peaks, strict=True) if peak is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=f"{kind} {TERMS}")
    axes.set_title(f"{title}, GiB", loc="left", fontsize=11)
    axes.set(xlabel="images in a batch", xticks=batches, ylim=(0, 1.1 * axes.get_ylim()[1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
