"""`python -m benchmarks memory`: peak memory of a tokenizer's training step against the batch size (paper, Figure 3).

Each point is a few steps of the real `python -m train stage2` in a process of its own, in one micro-batch: with the
perceptual and the adversarial term, and with both weights 0, when neither network is built. On a GPU it is torch's
peak, on a CPU what was resident, Python and its libraries included.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.runs import (
    OutOfMemory,
    Run,
    add_training_options,
    check_positive,
    provenance,
    temporary_folder,
    train_phase,
)
from um3.core.errors import UserError
from um3.core.files import atomic_file, write_json

STEPS = 3
TERMS = "perceptual loss and GAN"
KINDS = {"with": ("loss.adversarial_start_step=0",), "without": ("loss.perceptual=0", "loss.adversarial=0")}


class Curve(NamedTuple):
    """The peak memory (GiB) of one kind of step for each batch size; None where it ran out of memory."""

    kind: str
    peaks_gib: list[float | None]


def main(arguments: Sequence[str]) -> None:
    """Measure every point, print the table, and write memory.png and memory.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory", description=__doc__)
    add_training_options(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64], help="default 8 16 32 64")
    parser.add_argument("--out", default="runs/benchmarks", help="folder for memory.png and memory.json")
    options = parser.parse_intermixed_args(arguments)
    check_positive(options, "batches")
    batches = options.batches = sorted(set(options.batches))
    with temporary_folder() as name:
        tokenizer = options.tokenizer or str(_make_tokenizer(options, folder=Path(name)))
        runs = {kind: [_run(kind, batch, tokenizer, options=options) for batch in batches] for kind in KINDS}
    done = [run for found in runs.values() for run in found if run]
    if not done:
        raise UserError(f"not even {batches[0]} images fit; choose a smaller batch or model")
    curves = [Curve(kind, [run and run.peak_gib for run in found]) for kind, found in runs.items()]
    print("\n".join(table(curves, batches=batches, title=done[0].peak_kind)))
    out = Path(options.out)
    write_json(out / "memory.json", {"batches": batches, **dict(curves), **provenance(*done)})
    draw(curves, batches=batches, title=done[0].peak_kind, path=out / "memory.png")
    print(out / "memory.png")


def _make_tokenizer(options: argparse.Namespace, *, folder: Path) -> Path:
    small = ("loop.batch_size=2", "loop.micro_batch_size=0")
    label = "a tokenizer to start from: 1 step of stage 1"
    run = train_phase("stage1", options=options, steps=1, folder=folder, settings=small, label=label)
    return run.folder / "model"


def _run(kind: str, batch: int, tokenizer: str, *, options: argparse.Namespace) -> Run | None:
    """A finished run, its folder gone; None if it ran out of memory."""
    settings = [f"init_from={tokenizer}", f"loop.batch_size={batch}", "loop.micro_batch_size=0", *KINDS[kind]]
    label = f"{batch} images, {kind} {TERMS}"
    with temporary_folder() as name:
        try:
            return train_phase(
                "stage2", options=options, steps=STEPS, folder=Path(name), settings=settings, label=label
            )
        except OutOfMemory as error:
            print(error)
            return None


def table(curves: Sequence[Curve], *, batches: Sequence[int], title: str) -> list[str]:
    """Lines: batch sizes down, kinds of step across."""
    rows = [["images", *(curve.kind for curve in curves)]]
    for number, batch in enumerate(batches):
        peaks = [curve.peaks_gib[number] for curve in curves]
        rows.append([str(batch), *("no memory" if peak is None else f"{peak:.2f}" for peak in peaks)])
    return [f"{title}, GiB, with and without {TERMS}", *("".join(cell.rjust(12) for cell in row) for row in rows)]


def draw(curves: Sequence[Curve], *, batches: Sequence[int], title: str, path: Path) -> None:
    """The curves as a PNG file; a curve ends where memory did."""
    from matplotlib.figure import Figure

    from eval.report.figures import CURVE_COLOURS, INK, MUTED, PAPER, SAVED_DPI

    figure = Figure(figsize=(6, 3.4), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    for curve, colour in zip(curves, reversed(CURVE_COLOURS[:2]), strict=True):
        points = [(batch, peak) for batch, peak in zip(batches, curve.peaks_gib, strict=True) if peak is not None]
        label = f"{curve.kind} {TERMS}"
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, marker="o", label=label)
    axes.set_title(f"{title}, GiB", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("images in a batch", color=MUTED)
    axes.set_xticks(batches)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=SAVED_DPI, format="png")
