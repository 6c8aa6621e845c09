"""The pictures of a report as PNG files: what goes into it and what comes out, and how training went.

Every function returns None where the run has nothing to show.
"""

import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_mix.demo.scene_prompts import SKILLS
from eval.report.run_folder import RunData
from um3.core.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#22252a", "#767b84", "#d9d7d0", "#ffffff"
RIGHT, WRONG = "#2b8a3e", "#c92a2a"
DARK = {INK: "#e7e5df", MUTED: "#9a9ea7", RULE: "#3a3d44", PAPER: "#1b1d21"}
PIXELS_PER_INCH = 100
SAVED_DPI = 200
LINE = 1.35  # of the font size
MIX_TASKS = {"text": ("text", "#9fb7d9"), "i2t": ("image → text", "#f0c38e"), "t2i": ("text → image", "#a8cfa5")}
SKILL_TITLES = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colour",
    "position": "position",
    "color_attr": "colour of each",
}


class Canvas:
    """A page measured in pixels from its upper left corner, with pictures and text at given places."""

    def __init__(self, width: float, height: float, *, dark: bool = False):
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.colours = DARK if dark else {}
        size = (width / PIXELS_PER_INCH, height / PIXELS_PER_INCH)
        self.figure = Figure(figsize=size, facecolor=self.colours.get(PAPER, PAPER))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self._fit()

    def _fit(self) -> None:
        self.axes.set(xlim=(0, self.width), ylim=(self.height, 0), aspect="auto")

    def picture(self, image: NDArray, *, x: float, y: float, side: float, frame: str = RULE) -> None:
        """A square picture; one enlarged much stays in sharp pixels, so that nothing is smoothed into it."""
        from matplotlib.patches import FancyBboxPatch

        shape = FancyBboxPatch((x, y), side, side, boxstyle=f"round,pad=0,rounding_size={side * 0.06}")
        colour = self.colours.get(frame, frame)
        shape.set(facecolor="none", edgecolor=colour, linewidth=1.2 if frame != RULE else 0.8)
        shown = self.axes.imshow(image, extent=(x, x + side, y + side, y), interpolation="antialiased")
        self.axes.add_patch(shape)
        shown.set_clip_path(shape)
        self._fit()

    def text(
        self,
        words: str,
        *,
        x: float,
        y: float,
        size: float = 11,
        color: str = INK,
        align: Literal["left", "center"] = "left",
        middle: bool = False,
    ) -> None:
        """Lines from y down, or around y with `middle`; set one by one, so that equal y is an equal baseline."""
        lines = words.split("\n")
        top = y - len(lines) * size * LINE / 2 if middle else y
        for number, line in enumerate(lines):
            baseline = top + size * (LINE * number + 1)
            points = size * 72 / PIXELS_PER_INCH
            colour = self.colours.get(color, color)
            self.axes.text(x, baseline, line, fontsize=points, color=colour, ha=align, parse_math=False)


def write_figures(run: RunData, folder: Path) -> dict[str, Path]:
    """Write every figure the run has data for; returns their paths by name."""
    figures = {
        "hero": hero(run),
        "hero_dark": hero(run, dark=True),
        "drawings": drawings(run),
        "captions": captions(run),
        "reconstructions": reconstructions(run),
        "bits": bits(run),
        "losses": losses(run),
        "mix": mix(run),
        "forgetting": forgetting(run),
    }
    paths = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        with atomic_file(path) as partial:
            figure.savefig(partial, dpi=SAVED_DPI, format="png")
        paths[name] = path
    return paths


def hero(run: RunData, *, dark: bool = False) -> "Figure | None":
    """What the model does, in one wide picture: prompts and drawings, images and captions, images and reconstructions.

    Successes are shown where there are any; the figures beside it show everything in order.
    """
    shown, read, rebuilt = _best_drawings(run), _best_captions(run), _some_reconstructions(run)
    if not shown and not read and not rebuilt:
        return None
    canvas = Canvas(1500, 575, dark=dark)
    for title, x in (("text → image", 40), ("image → text", 690), ("image → codes → image", 1150)):
        canvas.text(title, x=x, y=24, size=20)
    for number, (image, prompt, frame) in enumerate(shown[:6]):
        x, y = 40 + 205 * (number % 3), 76 + 240 * (number // 3)
        canvas.picture(image, x=x, y=y, side=180, frame=frame)
        canvas.text(_wrapped(prompt, 25), x=x + 90, y=y + 190, size=13.5, align="center")
    for number, (image, caption) in enumerate(read[:3]):
        y = 76 + 160 * number
        canvas.picture(image, x=690, y=y, side=140)
        canvas.text(f"“{_wrapped(caption, 22)}”", x=848, y=y + 70, size=16, middle=True)
    for number, (original, image) in enumerate(rebuilt[:3]):
        y = 76 + 160 * number
        canvas.picture(original, x=1150, y=y, side=140)
        canvas.picture(image, x=1318, y=y, side=140)
        canvas.text("→", x=1304, y=y + 70, size=18, color=MUTED, align="center", middle=True)
    return canvas.figure


def drawings(run: RunData, *, per_skill: int = 10) -> "Figure | None":
    """The first drawings of each skill in the order of their prompts, framed by the checker's verdict."""
    images, samples = run.images.get("generation", {}).get("skills"), run.samples("generation").get("skills")
    if images is None or not samples:
        return None
    canvas = Canvas(40 + 150 * per_skill, 40 + 196 * len(SKILLS))
    for row, skill in enumerate(SKILLS):
        chosen = [index for index, sample in enumerate(samples) if sample["skill"] == skill][:per_skill]
        score = run.scores.get(f"skills/{skill}")
        y = 24 + 196 * row
        title = SKILL_TITLES[skill] + (f"   {score.shown()}" if score else "")
        canvas.text(title, x=24, y=y, size=14)
        for column, index in enumerate(chosen):
            x, passed = 24 + 150 * column, samples[index]["passed"]
            canvas.picture(images[index], x=x, y=y + 26, side=110, frame=RIGHT if passed else WRONG)
            canvas.text("✓" if passed else "✗", x=x + 116, y=y + 26, size=15, color=RIGHT if passed else WRONG)
            canvas.text(_wrapped(samples[index]["prompt"], 22), x=x, y=y + 141, size=10, color=MUTED)
    return canvas.figure


def captions(run: RunData, *, columns: int = 5, per_source: int = 15) -> "Figure | None":
    """Held-out images with what the model says of them; a wrong caption has the right one below it."""
    entries = []
    for source, samples in run.samples("captions").items():
        entries += list(zip(run.images["captions"][source], samples, strict=False))[:per_source]
    if not entries:
        return None
    rows = -(-len(entries) // columns)
    canvas = Canvas(40 + 290 * columns, 40 + 128 * rows)
    for number, (image, sample) in enumerate(entries):
        x, y = 24 + 290 * (number % columns), 24 + 128 * (number // columns)
        canvas.picture(image, x=x, y=y, side=104)
        color = RIGHT if sample["right"] else WRONG
        canvas.text("✓" if sample["right"] else "✗", x=x + 114, y=y, size=14, color=color)
        said = _wrapped(sample["caption"] or "(nothing)", 20)
        canvas.text(said, x=x + 134, y=y, size=12)
        if not sample["right"]:
            below = y + 12 * LINE * (said.count("\n") + 1) + 4
            canvas.text(_wrapped(sample["references"][0], 22), x=x + 134, y=below, size=11, color=MUTED)
    return canvas.figure


def reconstructions(run: RunData, *, per_source: int = 12) -> "Figure | None":
    """Rows: original, then every stage's reconstruction; one block per source."""
    arrays, stages = run.images.get("tokenizer", {}), run.samples("tokenizer").get("stages", [])
    sources = run.source_names("tokenizer", suffix="_original")
    if not sources:
        return None
    kinds = ["original", *stages]
    block = 30 + 112 * len(kinds)
    canvas = Canvas(140 + 112 * per_source, 24 + block * len(sources))
    for position, source in enumerate(sources):
        top = 24 + block * position
        canvas.text(source, x=24, y=top, size=14)
        for row, kind in enumerate(kinds):
            y = top + 28 + 112 * row
            score = run.scores.get(f"{source}_reconstruction_{kind}/psnr")
            label = kind.replace("stage", "stage ") + (f"\n{score.shown()}" if score else "")
            canvas.text(label, x=24, y=y + 50, size=12, color=MUTED, middle=True)
            for column, image in enumerate(arrays.get(f"{source}_{kind}", [])[:per_source]):
                canvas.picture(image, x=122 + 112 * column, y=y, side=102)
    return canvas.figure


def bits(run: RunData) -> "Figure | None":
    """By source: entropy of each bit, correlations, what flipping one changes, and a picture with each flipped."""
    reports, arrays = run.samples("tokenizer").get("bits", {}), run.images.get("tokenizer", {})
    if not reports:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.2 * len(reports)), layout="constrained", facecolor=PAPER)
    grid = figure.subplots(len(reports), 4, squeeze=False, width_ratios=(3, 2.6, 3, 2.6))
    for (entropy, correlation, flip, pictures), (source, report) in zip(grid, reports.items(), strict=True):
        numbers = range(len(report["entropy"]))
        titles = {"entropy": f"{source}: entropy, bits", "flip": "flipped: change in grey levels"}
        for axes, (name, title) in zip((entropy, flip), titles.items(), strict=True):
            axes.bar(numbers, report[name], color=CURVE_COLOURS[0])
            _style(axes, title=title, across="bit, most significant first")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        entropy.set_ylim(0, 1)
        shown = correlation.imshow(np.abs(report["correlation"]), vmin=0, vmax=1, cmap="Blues")
        _style(correlation, title="correlation, absolute", across="bit")
        for axis in (correlation.xaxis, correlation.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(shown, ax=correlation, shrink=0.8).ax.tick_params(colors=MUTED, labelsize=8)
        pictures.imshow(_sheet(arrays[f"{source}_flipped"]), interpolation="nearest")
        pictures.set_axis_off()
        pictures.set_title("a picture, then each bit flipped in turn", loc="left", fontsize=11, color=INK)
    return figure


def _sheet(images_KHWC: NDArray) -> NDArray:
    """The images in reading order on one white sheet, about square, a line of white between them."""
    count, height, width, channels = images_KHWC.shape
    columns, gap = math.ceil(math.sqrt(count)), max(1, width // 16)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for number, image_HWC in enumerate(images_KHWC):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image_HWC
    return sheet


CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "stage1": ("stage 1: reconstruct and align", {"train/mse": "squared error", "train/contrastive": "contrastive"}),
    "stage2": ("stage 2: sharpen", {"train/mse": "squared error", "train/perceptual": "perceptual"}),
    "um3": ("UM3: text and images", {"train/loss_text": "text", "train/loss_visual": "visual"}),
}
CURVE_COLOURS = ("#3b6fb6", "#d9822b", "#3f8f5b", "#8a5fa8", "#b04a4a", "#777777")


def losses(run: RunData) -> "Figure | None":
    """Training curves of the three recipes, logarithmic; a phase that has not run leaves its place empty."""
    if not any(run.metrics.values()):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained", facecolor=PAPER)
    for axes, (phase, (title, keys)) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        _style(axes, title=title)
        rows = run.metrics[phase]
        if not rows:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not run", color=MUTED, ha="center", transform=axes.transAxes)
            continue
        for (key, label), colour in zip(keys.items(), CURVE_COLOURS, strict=False):
            points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=label)
        _logarithmic(axes)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], *, titles: Mapping[str, str]) -> "Figure":
    """How metrics go: a panel per key of `titles`, logarithmic; a name's runs, rows of metrics each, share a colour."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(titles), 3.4), layout="constrained", facecolor=PAPER)
    for axes, (key, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items(), strict=True):
        _style(axes, title=title)
        for number, (name, several) in enumerate(runs.items()):
            colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
            for run, rows in enumerate(several):
                points = [(row["step"], row[key]) for row in rows if key in row]
                label = {"label": name} if run == 0 else {}
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, **label)
        _logarithmic(axes)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _logarithmic(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _style(axes: "Axes", *, title: str, across: str = "step") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel(across, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.patch.set_visible(False)


def mix(run: RunData) -> "Figure | None":
    """The share of each source in the samples between logged steps, and the tokens of each in all.

    Of a run that did not count its sources, the share of each task in the rows of every logged step.
    """
    tasks = list(MIX_TASKS)
    found = {key for row in run.metrics["um3"] for key in row if re.match("data/samples/.+/", key)}
    sources = sorted(found, key=lambda key: (tasks.index(key.split("/")[2]), key))
    keys = sources or [f"data/rows_{task}" for task in tasks]
    rows = [row for row in run.metrics["um3"] if all(key in row for key in keys)]
    if not rows:
        return None
    from matplotlib.figure import Figure

    shown = [MIX_TASKS[key.split("/")[2]] for key in sources] or list(MIX_TASKS.values())
    names = [": ".join([name, *key.split("/", 3)[3:]]) for key, (name, _) in zip(keys, shown, strict=True)]
    colours = [colour for _, colour in shown]
    counts = np.array([[row[key] for key in keys] for row in rows], dtype=float)
    counts = np.diff(counts, axis=0, prepend=0) if sources else counts
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(12, 2.6), layout="constrained", facecolor=PAPER)
    axes, *right = figure.subplots(1, 2, width_ratios=(3, 1)) if sources else [figure.subplots()]
    steps = [row["step"] for row in rows]
    axes.stackplot(steps, shares.T, labels=names, colors=colours, edgecolor=PAPER, linewidth=0.5)
    axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1))
    _style(axes, title="samples by source" if sources else "rows of a batch by task")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, labelcolor=INK, reverse=True)
    for bars in right:
        text, visual = (
            np.array([rows[-1].get(key.replace("samples", f"{half}_tokens"), 0) for key in keys]) / 1e6
            for half in ("text", "visual")
        )
        bars.barh(names, text, color=colours)
        bars.barh(names, visual, left=text, color=colours, alpha=0.5)
        _style(bars, title="10⁶ tokens: text, visual (pale)", across="")
        bars.set_yticklabels([])
    return figure


def forgetting(run: RunData) -> "Figure | None":
    """What held-out text costs while UM3 trains, against the model that it started from; None without a guard."""
    rows = [row for row in run.metrics["um3"] if isinstance(row.get("text_validation/text_loss"), int | float)]
    if not rows:
        return None
    from matplotlib.figure import Figure

    start = rows[0]["text_validation/start"]
    steps, values = [0, *(row["step"] for row in rows)], [start, *(row["text_validation/text_loss"] for row in rows)]
    figure = Figure(figsize=(12, 2.6), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.axhline(start, color=MUTED, linewidth=1, linestyle="--", label="the model at the start")
    axes.plot(steps, values, color=CURVE_COLOURS[0], linewidth=1.6, label="while it trains")
    axes.fill_between(steps, start, values, where=np.array(values) > start, color=WRONG, alpha=0.15, linewidth=0)
    for number, row in enumerate(row for row in rows if "text_validation/restart" in row):
        label = "back to the mix's start" if number == 0 else None
        axes.axvline(row["text_validation/restart"], color=CURVE_COLOURS[1], linewidth=1, label=label)
    _style(axes, title="held-out text, nats per token")
    axes.set_xlim(0, steps[-1])
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9, labelcolor=INK)
    return figure


def svg(figure: "Figure") -> str:
    """The figure as an SVG element that takes its colours and type from the page around it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "um3"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawn, count=1), count=1
    )
    drawn = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "var(--sans)", drawn)
    return drawn.replace(INK, "var(--ink)").replace(MUTED, "var(--muted)")


def _best_drawings(run: RunData) -> list[tuple[NDArray, str, str]]:
    """One drawing per skill, the first that passed if any did; without a checker the first drawings."""
    images, samples = run.images.get("generation", {}), run.samples("generation")
    if samples.get("skills"):
        found = []
        for skill in SKILLS:
            indices = [i for i, sample in enumerate(samples["skills"]) if sample["skill"] == skill]
            passed = [i for i in indices if samples["skills"][i]["passed"]]
            for i in (passed or indices)[:1]:
                found.append((images["skills"][i], samples["skills"][i]["prompt"], RULE if passed else WRONG))
        return found
    drawn = [(source, given) for source, given in samples.get("captions", {}).items()]
    return [
        (image, sample["prompt"], RULE)
        for source, given in drawn
        for image, sample in list(zip(images[f"{source}_drawn"], given, strict=False))[:6]
    ]


def _best_captions(run: RunData) -> list[tuple[NDArray, str]]:
    """Right captions first, from every source in turn, longest first."""
    by_source = []
    for source, samples in run.samples("captions").items():
        pairs = list(zip(run.images["captions"][source], samples, strict=False))
        pairs.sort(key=lambda pair: (not pair[1]["right"], -len(pair[1]["caption"])))
        by_source.append([(image, sample["caption"]) for image, sample in pairs])
    return _in_turn(by_source)


def _some_reconstructions(run: RunData) -> list[tuple[NDArray, NDArray]]:
    arrays, stages = run.images.get("tokenizer", {}), run.samples("tokenizer").get("stages", [])
    sources = run.source_names("tokenizer", suffix="_original")
    return _in_turn(
        [list(zip(arrays[f"{name}_original"], arrays[f"{name}_{stages[-1]}"], strict=True)) for name in sources]
    )


def _in_turn(lists: list[list[Any]]) -> list[Any]:
    longest = max(map(len, lists), default=0)
    return [items[place] for place in range(longest) for items in lists if place < len(items)]


def _wrapped(words: str, width: int) -> str:
    words = "".join(letter if letter.isprintable() else " " for letter in words)
    return "\n".join(textwrap.wrap(words, width)[:4])
