"""`python -m benchmarks growth`: what the loaders deliver, and what start-up and a step's data cost as things grow.

Loaders: items a second of CPU time, of batches that are read for the first time, beside what a training step of the
same config reads. Growth: CPU time and memory of one call against the number of code shards, samples, ranks,
tokens and vocabulary entries. Every size is measured in a forked process, so memory is what the call added; other ranks
are simulated. --small shrinks the lines and trains nothing.
"""

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks import harness, synthetic
from um3.core.files import write_json
from um3.core.metrics import commit, machine, versions

GOAL = 5.0
"""A loader delivers on a core so many times what a step reads."""
STEADY_S, FEWEST_MIB = 0.2, 1.0
"""A shorter call is repeated for so long and its fastest run counts; less memory is not told apart from none."""
CONSTANT, LINEAR = 0.2, 1.2
"""Largest exponents of what is called so."""
SAMPLES_PER_RANK, TEXT_SEQUENCES = 64, 8
MEASURED_S = 1.0
"""CPU seconds that a loader's rate is the mean of, at least."""
IMAGE_SIZE, IMAGE_BATCH, PAPER_MIX = 256, 64, [12.0, 1.0, 3.0]

Call = Callable[[], object]


class Line(NamedTuple):
    """A call of which the cost is measured against a size. prepare(size, folder) gives the call."""

    what: str
    unit: str
    prepare: Callable[[int, Path], Call]
    sizes: Sequence[int]
    small: Sequence[int]


class Point(NamedTuple):
    """The cost at one size: CPU time, and the memory that the first call added at its peak."""

    size: int
    cpu_s: float
    mib: float


def open_shards(size: int, folder: Path) -> Call:
    """Open `size` code shards, as every process of a run does at its start."""
    from data_mix.codes.shards import open_code_sources

    synthetic.write_codes(folder / f"shards-{size}", shards=size, images=1, patches=16)
    return lambda: open_code_sources(folder / f"shards-{size}", split="train")


def order_epoch(size: int, folder: Path) -> Call:
    """Draw the order of an epoch of `size` samples."""
    from data_mix.order import SampleOrder

    return lambda: SampleOrder(size, seed=0, name="made").index(0)


def split_samples(size: int, folder: Path) -> Call:
    """Divide `size` samples into train and val by the hash of their keys."""
    from data_mix.sources.config import ImageSourceConfig
    from data_mix.splits import choose_samples

    config = ImageSourceConfig(name="made", path="made")
    keys = "train-00000.parquet#{}".format
    return lambda: choose_samples(config, map(keys, range(size)), num_samples=size, split="train")


def read_as_rank(size: int, folder: Path) -> Call:
    """One rank of `size` plans a step of the whole batch and reads its own part."""
    how: Any = {"batch_size": SAMPLES_PER_RANK * size, "rank": size // 2, "world_size": size}
    batches = synthetic.made_sequences(folder, seq_len=1024, mix=[4, 2, 6], **how)
    batches.batch(0)
    return lambda: batches.batch(1)


def read_sequences(size: int, folder: Path) -> Call:
    """Read TEXT_SEQUENCES text samples of `size` tokens."""
    batches = synthetic.made_sequences(folder, seq_len=size, mix=[1, 0, 0], batch_size=TEXT_SEQUENCES)
    return lambda: batches.batch(0)


def load_vocabulary(size: int, folder: Path) -> Call:
    """Load a text tokenizer of `size` entries, and hash them for the name of the cache of tokenised text."""
    from um3.model.text_tokenizer import read_text_tokenizer, vocabulary_digest

    path = folder / f"vocabulary-{size}"
    synthetic.made_text_tokenizer(size).save_pretrained(path)
    return lambda: vocabulary_digest(read_text_tokenizer(path))


LINES = {
    "shards": Line("open code shards", "shards", open_shards, (1, 10, 100, 1000, 10_000), (1, 10, 100)),
    "samples": Line("order of an epoch", "samples", order_epoch, (10**5, 10**6, 10**7, 10**8), (10**4, 10**5)),
    "keys": Line("train and val by hash", "samples", split_samples, (10**4, 10**5, 10**6), (10**3, 10**4)),
    "ranks": Line("a rank's part of a step", "ranks", read_as_rank, (1, 8, 64, 512, 1024), (1, 16)),
    "tokens": Line("a step of text", "tokens", read_sequences, (1024, 4096, 16_384, 65_536), (1024, 4096)),
    "vocabulary": Line("text tokenizer", "entries", load_vocabulary, (1000, 16_000, 128_000, 256_000), (1000, 4000)),
}


def main(arguments: Sequence[str]) -> None:
    """Measure loaders and lines, print both tables, and write growth.png and growth.json."""
    parser = harness.benchmark_parser("growth", __doc__)
    harness.add_step_options(parser, steps=20, warmup=3)
    parser.add_argument("--config", default="demo", help="experiment of the training steps (default demo)")
    parser.add_argument("--images", type=harness.positive, default=2048, help="images to encode (default 2048)")
    parser.add_argument("--lines", nargs="*", choices=LINES, default=list(LINES), help="default: all")
    parser.add_argument("--small", action="store_true", help="lines at the size of a test, and no training")
    parser.add_argument("--out", default="runs/benchmarks", help="folder of growth.png and growth.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of both phases")
    options = parser.parse_intermixed_args(arguments)
    with harness.temporary_folder() as place:
        folder = Path(place)
        reads = {} if options.small else read_by_steps(options, folder)
        for module in ("data_mix.batches.mix", "data_mix.sources.image_sources", "train.recipes.tokenizer_setup"):
            __import__(module)  # once, for all forks
        rates = in_fork(delivered_of_paper, folder / "made")
        rates |= {} if options.small else in_fork(delivered_of_runs, folder)
        points = {}
        for name in options.lines:
            line = LINES[name]
            print(f"growth: {line.what}", file=sys.stderr, flush=True)
            sizes = line.small if options.small else line.sizes
            points[name] = [in_fork(measure, name, size, folder / "made") for size in sizes]
    ratios = {what: rates[what] / per_s for what, per_s in reads.items()}
    print("\n".join([*loader_table(rates, reads), "", *growth_table(points)]))
    out = Path(options.out)
    if points:
        plot(points, path=out / "growth.png")
    about = {"commit": commit(), "machine": machine(), "versions": versions()}
    numbers = {"delivered": rates, "read_by_steps": reads, "ratio": ratios, "growth": points}
    write_json(out / "growth.json", numbers | about)
    print(json.dumps(numbers))


def read_by_steps(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images of stage 1 and tokens of UM3 that training reads in a second of CPU time; `folder` keeps both runs."""
    how: Any = {"options": options, "steps": options.warmup + options.steps, "folder": folder}
    stage1 = harness.train_phase("stage1", **how)
    tokenizer, codes = f"visual_tokenizer={stage1.folder}/model", f"{folder}/codes"
    limits = [f"limit={options.images}", "samples_per_shard=512"]
    command = ["data_mix", "encode", "--config", options.config, tokenizer, f"output_dir={codes}", *limits]
    harness.run_process(command, label="encode images")
    settings = [tokenizer, f"data.codes={codes}", "text_validation.every_steps=0"]
    um3 = harness.train_phase("um3", settings=settings, **how)
    images = fmean(row["perf/images_per_s"] / row["perf/steps_per_s"] for row in stage1.rows)
    tokens = um3.step_tokens(warmup=options.warmup)
    stage1_s, um3_s = (fmean(run.step_seconds(warmup=options.warmup, cpu=True)) for run in (stage1, um3))
    return {"images": images / stage1_s, "tokens": tokens / um3_s}


def delivered_of_runs(folder: Path) -> dict[str, float]:
    """Images and tokens in a second of CPU time, from the data of the runs of `read_by_steps`."""
    from data_mix.batches.image_batches import ImageBatches
    from data_mix.batches.mix import SequenceBatches
    from train.recipes.tokenizer_setup import open_sources
    from train.settings.tokenizer import Stage1Config
    from train.settings.um3 import UM3Config
    from um3.core.config import load_config
    from um3.core.files import read_json
    from um3.model.text_tokenizer import read_text_tokenizer
    from um3.model.vocabulary import UnifiedVocabulary

    stage1 = load_config(Stage1Config, path=folder / "stage1/config.yaml")
    data, loop = stage1.data, stage1.loop
    sources = open_sources(data, size=stage1.model.image_size, seed=loop.seed)
    weights = [source.weight for source in data.sources]
    images = ImageBatches(sources, weights=weights, batch_size=loop.batch_size, seed=loop.seed, caption=data.caption)
    um3, model = load_config(UM3Config, path=folder / "um3/config.yaml"), folder / "um3/model"
    sequences = SequenceBatches(
        um3.data,
        ids=UnifiedVocabulary.from_dict(read_json(model / "config.json")["um3"]),
        text_tokenizer=read_text_tokenizer(model),
        batch_size=um3.loop.batch_size,
        seed=um3.loop.seed,
        cache=folder / "um3/cache",
    )
    return {"images": rate(images), "tokens": rate(sequences)}


def delivered_of_paper(folder: Path) -> dict[str, float]:
    """The same of made data: the paper's mix in sequences of 4,096, and JPEGs in a folder and in a parquet file."""
    from data_mix.batches.image_batches import ImageBatches
    from data_mix.sources.image_sources import ImageSourceConfig, open_image_source

    synthetic.write_jpegs(folder)
    rates = {"tokens, 4,096 packed": rate(synthetic.made_sequences(folder, seq_len=4096, mix=PAPER_MIX, batch_size=32))}
    for kind, path in {"folder": folder / "jpegs", "parquet": folder / "jpegs.parquet"}.items():
        config = ImageSourceConfig(name=kind, path=str(path), val_fraction=0.0)
        batches = ImageBatches(
            [open_image_source(config, split="train", size=IMAGE_SIZE, seed=0)], batch_size=IMAGE_BATCH, seed=0
        )
        rates[f"images, {kind} of JPEGs"] = rate(batches, steps=synthetic.JPEGS // IMAGE_BATCH)
    return rates


def rate(batches: Any, *, steps: int = 0) -> float:
    """Images or tokens without padding in a second of CPU time: over `steps`, or MEASURED_S after a first batch."""
    start, step, items = time.process_time(), 0, 0
    while (step < steps) if steps else (time.process_time() - start < MEASURED_S):
        batch = batches.batch(step)
        step += 1
        if step == 1 and not steps:  # opens files
            start = time.process_time()
            continue
        items += len(batch.images_BHWC) if hasattr(batch, "images_BHWC") else int(batch.seen_KC[:, 1:3].sum())
    return items / (time.process_time() - start)


def in_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function` in a forked process with one torch thread."""
    import torch

    with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, size: int, folder: Path) -> Point:
    """The cost of a line's call at one size."""
    line = LINES[name]
    line.prepare(line.small[0], folder)()  # imports
    call = line.prepare(size, folder)
    gc.collect()
    before_mib = _peak_mib(reset=True)
    seconds = [_cpu_seconds(call)]
    mib = _peak_mib() - before_mib
    while sum(seconds) < STEADY_S:
        seconds.append(_cpu_seconds(call))
    return Point(size, min(seconds), mib)


def _cpu_seconds(call: Call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def _peak_mib(*, reset: bool = False) -> float:
    """Peak memory of this process; on Linux `reset` makes the present memory the peak."""
    from um3.core.progress import peak_memory_gib

    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return 1024 * peak_memory_gib()


def exponent(first: tuple[float, float], last: tuple[float, float]) -> float:
    """The power of the size with which a cost grows between two (size, cost)."""
    return math.log(last[1] / first[1]) / math.log(last[0] / first[0])


def verdict(power: float) -> str:
    """constant, linear, or neither, with the exponent."""
    kind = "constant" if power <= CONSTANT else "less than linear" if power < 0.8 else "linear"
    return f"{kind if power <= LINEAR else 'worse than linear'} ({power:.2f})"


def growth_table(points: dict[str, list[Point]]) -> list[str]:
    """Markdown: a row for each line, with the exponents between its two largest sizes."""
    if not points:
        return []
    rows = ["| call | from | to | CPU time | grows | memory | grows |", "|---|---|---|---|---|---|---|"]
    for name, (first, *_, before, last) in ((name, (of_line[0], *of_line)) for name, of_line in points.items()):
        line = LINES[name]
        time_power = exponent((before.size, before.cpu_s), (last.size, last.cpu_s))
        memory_power = exponent(*((point.size, max(point.mib, FEWEST_MIB)) for point in (before, last)))
        rows.append(
            f"| {line.what} | {first.size:,} | {last.size:,} {line.unit} | {duration(first.cpu_s)} to "
            f"{duration(last.cpu_s)} | {verdict(time_power)} | {first.mib:.1f} to {last.mib:.1f} MiB | "
            f"{verdict(memory_power)} |"
        )
    return rows


def loader_table(rates: dict[str, float], reads: dict[str, float]) -> list[str]:
    """Markdown: what each loader delivers, and as a multiple of what the step reads."""
    rows = ["| loader | a second of CPU time | a step reads in one | ratio |", "|---|---|---|---|"]
    for what, per_s in rates.items():
        ratio = f"{per_s / reads[what]:.1f}x (goal {GOAL:.0f}x)" if what in reads else ""
        rows.append(f"| {what} | {per_s:,.0f} | {f'{reads[what]:,.0f}' if what in reads else ''} | {ratio} |")
    return rows


def duration(seconds: float) -> str:
    """Three digits, in us, ms or s."""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if 1e3 * seconds >= 1 else (1e6, "us")
    return f"{seconds * scale:.3g} {unit}"


def plot(points: dict[str, list[Point]], *, path: Path) -> None:
    """Write the lines to a PNG file: CPU time above, memory below; dotted: linear. The axes are logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    from eval.report.figures import CURVE_COLOURS, MUTED, save, themed

    figure = Figure(figsize=(2.6 * len(points), 5), layout="constrained")
    for column, (name, of_line) in zip(figure.subplots(2, len(points), squeeze=False).T, points.items(), strict=True):
        sizes = [point.size for point in of_line]
        costs = [point.cpu_s for point in of_line], [max(point.mib, FEWEST_MIB) for point in of_line]
        for number, (axes, values) in enumerate(zip(column, costs, strict=True)):
            axes.plot(sizes, values, marker="o", markersize=4, color=CURVE_COLOURS[number])
            linear = [values[-1] * size / sizes[-1] for size in sizes]
            axes.plot(sizes, linear, color=MUTED, linewidth=0.8, linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel=LINES[name].unit if number else "")
            axes.set_ylim(min(*values, max(values) / 30) / 2, max(*values, 30 * min(values)) * 2)
            axes.yaxis.set_minor_formatter(NullFormatter())
        column[0].set_title(LINES[name].what, loc="left")
    for axes, label in zip(figure.axes[:: len(points)], ("CPU seconds", "MiB (1: or less)"), strict=True):
        axes.set_ylabel(label)
    save(themed(figure), path)
