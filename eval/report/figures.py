"""The figures of a report: sample images, and curves of the training. Every figure is a matplotlib figure.

Every function returns None if the run has no data for its figure.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_mix.batches.mix_figure import run_mix_figure
from eval.report.run_folder import RunData
from eval.report.samples import (
    NO_CAPTION,
    NUM_CAPTIONS,
    NUM_GENERATED,
    Tile,
    TileGroup,
    best_captions,
    best_generated,
    last_reconstructions,
)
from um3.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#22252a", "#767b84", "#d9d7d0", "#ffffff"
RIGHT, WRONG = "#2b8a3e", "#c92a2a"
DARK = {INK: "#e7e5df", MUTED: "#9a9ea7", RULE: "#3a3d44", PAPER: "#1b1d21"}
CURVE_COLOURS = ("#3b6fb6", "#d9822b", "#3f8f5b", "#8a5fa8", "#b04a4a", "#777777")
SAVED_DPI = 200
LINE = 1.35  # of the font size
MAX_DRAWN = 1e300  # also excludes nan
CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "stage1": ("stage 1: reconstruct and align", {"train/mse": "squared error", "train/contrastive": "contrastive"}),
    "stage2": ("stage 2: sharpen", {"train/mse": "squared error", "train/perceptual": "perceptual"}),
    "um3": ("UM3: text and images", {"train/loss_text": "text", "train/loss_visual": "visual"}),
}

MEASURED = "validation/contrastive/"

Points = Sequence[tuple[int, float]]


def write_figures(run: RunData) -> "dict[str, Figure]":
    """Write every figure that the run has data for as RUN/figures/NAME.png, remove the others; return them by name."""
    drawn = {}
    for name, draw in FIGURES.items():
        path = run.folder / "figures" / f"{name}.png"
        shown = f"{run.folder}: what the figure {name} shows"
        figure = run.attempt(shown, draw, run, default=None)
        if figure is not None and run.attempt(shown, save, figure, path, default=None):
            drawn[name] = figure
        else:
            path.unlink(missing_ok=True)
    return drawn


@contextmanager
def boxes_for_missing_letters() -> Iterator[None]:
    """Letters that the font lacks, as of Chinese captions, become boxes without a warning for each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def save(figure: "Figure", path: Path) -> Path:
    """Write the figure as a PNG."""
    with atomic_file(path) as partial, boxes_for_missing_letters():
        figure.savefig(partial, dpi=SAVED_DPI, format="png")
    return path


class Canvas:
    """A page in pixels (100 to the inch) from its upper left corner, for images and text at given places."""

    def __init__(self, width: float, height: float, *, dark: bool = False):
        from matplotlib.figure import Figure

        self.colours = DARK if dark else {}
        self.figure = Figure((width / 100, height / 100), facecolor=self.colours.get(PAPER, PAPER))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.limits: dict[str, Any] = {"xlim": (0, width), "ylim": (height, 0), "aspect": "auto"}
        self.axes.set(**self.limits)

    def image(self, image: NDArray, *, x: float, y: float, side: float, frame: str = RULE) -> None:
        """A square image with a rounded frame; enlarged by more than a factor 3 it stays in sharp pixels."""
        from matplotlib.patches import FancyBboxPatch

        shape = FancyBboxPatch((x, y), side, side, boxstyle=f"round,pad=0,rounding_size={side * 0.06}")
        colour = self.colours.get(frame, frame)
        shape.set(facecolor="none", edgecolor=colour, linewidth=0.8 if frame == RULE else 1.2)
        shown = self.axes.imshow(image, extent=(x, x + side, y + side, y), interpolation="antialiased")
        self.axes.add_patch(shape)
        shown.set_clip_path(shape)
        self.axes.set(**self.limits)  # imshow changes them

    def text(
        self, words: str, *, x: float, y: float, size: float, color: str = INK, ha: str = "left", middle: bool = False
    ) -> None:
        """Lines from y down, or centred at y with `middle`; texts with equal y share their first baseline."""
        lines = words.split("\n")
        top = y - len(lines) * size * LINE / 2 if middle else y
        for number, line in enumerate(lines):
            shown = self.axes.text(x, top + size * (LINE * number + 1), line, ha=ha, parse_math=False)
            shown.set(fontsize=0.72 * size, color=self.colours.get(color, color))


def hero(run: RunData, *, dark: bool = False) -> "Figure | None":
    """What the model does: generated images, captions and reconstructions side by side (`selection_note`).

    The other figures show all samples in order.
    """
    generated, captions = best_generated(run.shown), best_captions(run.shown)
    rebuilt = last_reconstructions(run.shown)
    if not generated and not captions and not rebuilt:
        return None
    canvas = Canvas(1500, 575, dark=dark)
    for title, x in (("text → image", 40), ("image → text", 690), ("image → codes → image", 1150)):
        canvas.text(title, x=x, y=24, size=20)
    for number, tile in enumerate(generated[:NUM_GENERATED]):
        x, y = 40 + 205 * (number % 3), 76 + 240 * (number // 3)
        canvas.image(tile.image, x=x, y=y, side=180, frame=WRONG if tile.right is False else RULE)
        canvas.text(_wrapped(tile.text, 25, lines=2), x=x + 90, y=y + 190, size=13.5, ha="center")
    for number, tile in enumerate(captions[:NUM_CAPTIONS]):
        y = 76 + 160 * number
        canvas.image(tile.image, x=690, y=y, side=140, frame=WRONG if tile.right is False else RULE)
        text = _wrapped(tile.text, 26, lines=6)
        canvas.text(text if text == NO_CAPTION else f"“{text}”", x=848, y=y + 70, size=16, middle=True)
    for number, (original, reconstruction) in enumerate(rebuilt[:3]):
        y = 76 + 160 * number
        canvas.image(original.image, x=1150, y=y, side=140)
        canvas.image(reconstruction.image, x=1318, y=y, side=140)
        canvas.text("→", x=1304, y=y + 70, size=18, color=MUTED, ha="center", middle=True)
    return canvas.figure


def tile_figure(
    groups: Sequence[TileGroup], *, columns: int = 10, rows: int = 1, side: int = 110, pitch: int = 150
) -> "Figure | None":
    """The first `rows` x `columns` tiles of each group below its title, each with its text and its mistake.

    Sizes in pixels: `side` of an image, `pitch` from one image to the next.
    """
    groups = [group for group in groups if group.tiles]
    if not groups:
        return None
    shown = [tile for group in groups for tile in group.tiles[: rows * columns]]
    num_lines = max(_text_of(tile).count("\n") + _detail_of(tile).count("\n") + 2 for tile in shown)
    row_height = side + math.ceil(20 + 10 * LINE * num_lines if any(tile.text for tile in shown) else 10)
    num_rows = [min(rows, -(-len(group.tiles) // columns)) for group in groups]
    canvas = Canvas(40 + pitch * columns, 24 + sum(34 + row_height * count for count in num_rows))
    top = 24
    for group, count in zip(groups, num_rows, strict=True):
        canvas.text(f"{group.title}   {group.note}", x=24, y=top, size=14)
        for number, tile in enumerate(group.tiles[: count * columns]):
            x, y = 24 + pitch * (number % columns), top + 26 + row_height * (number // columns)
            verdict = {True: RIGHT, False: WRONG, None: RULE}[tile.right]
            canvas.image(tile.image, x=x, y=y, side=side, frame=verdict)
            if tile.right is not None:
                canvas.text("✓" if tile.right else "✗", x=x + side + 6, y=y, size=15, color=verdict)
            text = _text_of(tile)
            canvas.text(text, x=x, y=y + side + 5, size=10)
            below = y + side + 7 + 10 * LINE * (text.count("\n") + 1)
            canvas.text(_detail_of(tile), x=x, y=below, size=9.5, color=MUTED)
        top += 34 + row_height * count
    return canvas.figure


def _text_of(tile: Tile) -> str:
    return _wrapped(tile.text, 22)


def _detail_of(tile: Tile) -> str:
    """The mistake, or what the caption should be; empty for a tile that is right."""
    return "" if tile.right else _wrapped(tile.detail, 24)


def reconstructions(run: RunData) -> "Figure | None":
    """Per source a row of validation images, then a row of their reconstructions after each stage."""
    groups = [group._replace(title=f"{group.source}: {group.title}") for group in run.shown["reconstructions"]]
    return tile_figure(groups, columns=12, side=102, pitch=112)


def bits(run: RunData) -> "Figure | None":
    """Per source: the entropy of each bit, the correlations of the bits, and the effect of flipping each bit."""
    if not (part := run.parts.get("tokenizer")) or not (reports := part.samples.get("bits")):
        return None
    from matplotlib.ticker import MaxNLocator

    figure = _figure(12, 3.2 * len(reports))
    grid = figure.subplots(len(reports), 4, squeeze=False, width_ratios=(3, 2.6, 3, 2.6))
    for (entropy, correlation, flip, flipped), (source, report) in zip(grid, reports.items(), strict=True):
        for axes, name in ((entropy, "entropy"), (flip, "flip")):
            axes.bar(range(len(report[name])), report[name], color=CURVE_COLOURS[0])
            axes.set(xlabel="bit, most significant first")
        entropy.set_ylim(0, 1)
        shown = correlation.imshow(np.abs(report["correlation"]), vmin=0, vmax=1, cmap="Blues")
        figure.colorbar(shown, ax=correlation, shrink=0.8)
        correlation.set(xlabel="bit")
        for axis in (entropy.xaxis, flip.xaxis, correlation.xaxis, correlation.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        flipped.imshow(_sheet(part.images[f"{source}_flipped"]), interpolation="nearest")
        flipped.set_axis_off()
        entropy.set_title(f"{run.source_title(source)}: entropy, bits", loc="left")
        correlation.set_title("correlation, absolute", loc="left")
        flip.set_title("flipped: change in grey levels", loc="left")
        flipped.set_title("an image, then each bit flipped", loc="left")
    return themed(figure)


def _sheet(images_KHWC: NDArray) -> NDArray:
    """The images in reading order on one white sheet, about square, with white gaps."""
    count, height, width, channels = images_KHWC.shape
    columns, gap = math.ceil(math.sqrt(count)), max(1, width // 16)
    rows = -(-count // columns)
    padding = ((0, rows * columns - count), (0, gap), (0, gap), (0, 0))
    grid = np.pad(images_KHWC, padding, constant_values=255).reshape(rows, columns, height + gap, width + gap, channels)
    return grid.swapaxes(1, 2).reshape(rows * (height + gap), columns * (width + gap), channels)[:-gap, :-gap]


def losses(run: RunData) -> "Figure | None":
    """Training curves of the three phases; the panel of a phase without metrics says so."""
    if not any(run.metrics.values()):
        return None
    panels = {
        title: {label: [points(run.metrics[phase], key)] for key, label in keys.items()}
        for phase, (title, keys) in CURVES.items()
    }
    return curves(panels, width=12)


def validation(run: RunData) -> "Figure | None":
    """Stage 1 on validation images: the contrastive loss beside that of training, and the reconstruction."""
    rows = run.metrics["stage1"]
    names = {name: run.source_title(name) for name in validated(rows)}
    if not names:
        return None
    trained = {"training": [points(rows, "train/contrastive")]}
    contrastive, psnr = (
        {title: [points(rows, f"validation/{metric}/{name}")] for name, title in names.items()}
        for metric in ("contrastive", "psnr")
    )
    panels = {"contrastive loss, validation and training": contrastive | trained, "validation PSNR, dB": psnr}
    return curves(panels, width=12, scale="linear")


def validated(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The sources of which stage 1 measured the contrastive loss on validation images."""
    return list(dict.fromkeys(key.rpartition("/")[2] for row in rows for key in row if key.startswith(MEASURED)))


def points(rows: Iterable[Mapping[str, Any]], key: str) -> Points:
    """(step, value) of every row of a metrics.jsonl that has a number under `key` which can be drawn."""
    numbers = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [point for point in numbers if all(abs(number) < MAX_DRAWN for number in point)]


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Points]]], *, width: float = 0, scale: Literal["log", "linear"] = "log"
) -> "Figure":
    """A panel per title, a colour per label, a curve per run; `width` in inches, by default 6 per panel."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = _figure(width or 6 * len(panels), 3.4)
    for axes, (title, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set_title(title, loc="left")
        if not any(run for runs in series.values() for run in runs):
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not run", color=MUTED, ha="center", transform=axes.transAxes)
            continue
        for number, (label, runs) in enumerate(series.items()):
            colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
            for index, run in enumerate(filter(None, runs)):
                axes.plot(*zip(*run, strict=True), color=colour, linewidth=1.4, label=None if index else label)
        axes.set(xlabel="step", yscale=scale)
        if scale == "log":
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.legend(frameon=False, fontsize=9)
    return themed(figure)


def forgetting(run: RunData) -> "Figure | None":
    """The loss on validation text while UM3 trains, against the model that it started from."""
    measured = points(run.metrics["um3"], "text_validation/text_loss")
    if not measured:
        return None
    start = points(run.metrics["um3"], "text_validation/start")[0][1]
    ends = [(0, start), (measured[-1][0], start)]
    series = {"during training": [[(0, start), *measured]], "the model at the start": [ends]}
    figure = curves({"validation text, nats per token": series}, width=12, scale="linear")
    steps, losses = map(np.array, zip(*measured, strict=True))
    figure.axes[0].fill_between(steps, start, losses, where=losses > start, color=WRONG, alpha=0.15, linewidth=0)
    return figure


def mix(run: RunData) -> "Figure | None":
    """The data that UM3 read, by task and source."""

    def titled(key: str) -> str:
        start, slash, source = key.rpartition("/")
        return start + slash + run.source_title(source)

    figure = run_mix_figure([{titled(key): value for key, value in row.items()} for row in run.metrics["um3"]])
    return figure and themed(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def themed(figure: "Figure") -> "Figure":
    """The figure in the report's colours, so that `svg` can replace them with the page's."""
    for axes in figure.axes:
        axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=11, color=INK, parse_math=False)
        axes.xaxis.label.set_color(MUTED)
        axes.yaxis.label.set_color(MUTED)
        axes.tick_params(colors=MUTED, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
        axes.patch.set_visible(False)
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
        for label in legend.get_texts() if legend else ():
            label.set_color(INK)
            label.set_parse_math(False)
    return figure


def svg(figure: "Figure") -> str:
    """The figure as an SVG element that takes its colours and font from the page around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "um3"}), boxes_for_missing_letters():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "var(--sans)", body)
    return f"{head}>{body}".replace(INK, "var(--ink)").replace(MUTED, "var(--muted)")


FIGURES: "dict[str, Callable[[RunData], Figure | None]]" = {
    "hero": hero,
    "hero_dark": lambda run: hero(run, dark=True),
    "generated": lambda run: tile_figure(run.shown["skills"]),
    "captions": lambda run: tile_figure(run.shown["captions"], rows=2),
    "reconstructions": reconstructions,
    "bits": bits,
    "losses": losses,
    "validation": validation,
    "mix": mix,
    "forgetting": forgetting,
}


def _wrapped(words: str, width: int, *, lines: int = 4) -> str:
    """At most `lines` lines of `width` characters; an ellipsis ends a text that is longer."""
    words = "".join(letter if letter.isprintable() else " " for letter in words)
    return "\n".join(textwrap.wrap(words, width, max_lines=lines, placeholder=" …"))
