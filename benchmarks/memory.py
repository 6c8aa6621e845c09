"""`python -m benchmarks memory`: peak memory of stage 2's training step against the batch size (paper, Figure 3).

Each point is a few steps of `python -m train stage2` in its own process, in one micro-batch: with perceptual loss and
GAN, and without either network. The peak is torch's on a GPU and resident memory, Python included, on a CPU.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from um3.core.errors import UserError
from um3.core.files import atomic_file, write_json

STEPS = 3
TERMS = "perceptual loss and GAN"
KINDS = {"with": ["loss.adversarial_start_step=0"], "without": ["loss.perceptual=0", "loss.adversarial=0"]}

Peaks = Mapping[str, Sequence[float | None]]
"""Peak memory (GiB) by kind, one value a batch size; None where it ran out of memory."""


def main(arguments: Sequence[str]) -> None:
    """Measure every point, print the table, and write memory.png and memory.json."""
    parser, sizes = harness.benchmark_parser("memory", __doc__), [8, 16, 32, 64]
    harness.add_training_options(parser)
    parser.add_argument("--batches", type=harness.positive, nargs="+", default=sizes, help="default 8 16 32 64")
    parser.add_argument("--out", default="runs/benchmarks", help="folder for memory.png and memory.json")
    options = parser.parse_intermixed_args(arguments)
    batches = sorted(set(options.batches))
    with harness.temporary_folder() as name:
        if not (tokenizer := options.tokenizer):
            small = ["loop.batch_size=2", "loop.micro_batch_size=0"]
            run = harness.train_phase("stage1", options=options, steps=1, folder=Path(name), settings=small)
            tokenizer = run.folder / "model"
        runs = {kind: [_run(kind, batch, tokenizer, options=options) for batch in batches] for kind in KINDS}
    finished = [run for kind_runs in runs.values() for run in kind_runs if run]
    if not finished:
        raise UserError(f"a batch of {batches[0]} images does not fit; choose a smaller batch or model")
    peaks = {kind: [run and run.peak_gib for run in kind_runs] for kind, kind_runs in runs.items()}
    print("\n".join(table(peaks, batches=batches, title=finished[0].peak_kind)))
    out = Path(options.out)
    write_json(out / "memory.json", {"batches": batches, **peaks, **finished[0].provenance})
    plot(peaks, batches=batches, title=finished[0].peak_kind, path=out / "memory.png")
    print(out / "memory.png")


def _run(kind: str, batch: int, tokenizer: str, *, options: argparse.Namespace) -> harness.TrainingRun | None:
    settings = [f"init_from={tokenizer}", f"loop.batch_size={batch}", "loop.micro_batch_size=0", *KINDS[kind]]
    with harness.temporary_folder() as name:
        how: Any = {"folder": Path(name), "settings": settings, "label": f"{batch} images, {kind} {TERMS}"}
        try:
            return harness.train_phase("stage2", options=options, steps=STEPS, **how)
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
