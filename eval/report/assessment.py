"""What a run does well and what it does not, in sentences: the first lines of a report.

Every finding rests on a value of the run and something to compare it with: chance, the captions of other images, the
real images. The few fixed limits are named below.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from eval.report.figures import MEASURED, points, validated
from eval.report.run_folder import RunData
from eval.scores import Score

FEW_ITEMS = 100
"""Below this a share has a standard error of 5 points and more."""
GOOD_PSNR, POOR_PSNR = 22.0, 18.0
"""In dB. QLIP-B/16 has 23 on ImageNet; the mean colours of the patches alone had 14 to 17 on emoji and on photos."""
GRID_SEEN, FINE_PSNR = 1.15, 30.0
"""Seams above the first are seen, unless the reconstruction is as fine as the second, in dB (emoji: 1.23 at 21 dB)."""
GOOD_SHARE = 0.75
"""Of items that are right."""
LETTERS_BITS = 4.6
"""Bits per byte, on Python's documentation, of a model that knows how frequent each byte is and nothing else."""
SPLIT_WORDS = {"train": "training", "val": "validation"}
CUT_SHARE = 0.02
"""Share of truncated captions that is worth a line."""
RISEN = 1.2
"""A validation loss that ends so many times above its least value tells of images that are known by heart."""


class Finding(NamedTuple):
    """`good` is None for a fact that is neither good nor bad."""

    good: bool | None
    text: str


def findings(run: RunData) -> list[Finding]:
    """What a reader should know first: what works, then facts about the data, then what does not work."""
    found = [*_data(run), *_truncated_captions(run), *_learned_by_heart(run)]
    for score in run.scores.values():
        if score.value is not None:
            found += _of_score(score, run=run)
    return sorted(found, key=lambda finding: (True, None, False).index(finding.good))


def _data(run: RunData) -> Iterator[Finding]:
    """The images of every source, and those that are skipped."""
    splits: Mapping[str, Any] = run.codes.get("splits", {})
    for name in {name: None for sources in splits.values() for name in sources}:
        counts = {split: sources[name] for split, sources in splits.items() if name in sources}
        numbers = " and ".join(f"{count['images']:,} {SPLIT_WORDS.get(s, s)}" for s, count in counts.items())
        reasons: dict[str, int] = {}
        for reason, number in (item for count in counts.values() for item in count["skipped"].items()):
            reasons[reason] = reasons.get(reason, 0) + number
        reasons = {**run.codes.get("unused", {}).get(name, {}), **reasons}
        title, skipped = run.source_title(name), ", ".join(f"{reason} ({n:,})" for reason, n in reasons.items())
        yield Finding(None, f"{title}: {numbers} images." + (f" Skipped: {skipped}." if skipped else ""))


def _truncated_captions(run: RunData) -> Iterator[Finding]:
    row: dict[str, Any] = next((row for row in reversed(run.metrics["um3"]) if "data/truncated_captions" in row), {})
    read = sum(float(row.get(f"data/samples/{task}", 0)) for task in ("i2t", "t2i"))
    if read and (share := row["data/truncated_captions"] / read) > CUT_SHARE:
        remedy = "raise um3's data.seq_len, or shorten them"
        yield Finding(False, f"{share:.0%} of the captions that UM3 read were cut to fit its sequence: {remedy}.")


def _learned_by_heart(run: RunData) -> Iterator[Finding]:
    """Sources on whose validation images stage 1's contrastive loss has risen again."""
    rows = run.metrics["stage1"]
    for name in validated(rows):
        if not (measured := points(rows, f"{MEASURED}{name}")):
            continue
        (step, least), (_, last) = min(measured, key=lambda point: point[1]), measured[-1]
        if last > RISEN * least:
            numbers = f"contrastive loss {least:.2f} after {step:,} steps, {last:.2f} at the end"
            remedy = "more images, more captions an image, or fewer steps"
            text = f"Stage 1 learned captions of {run.source_title(name)} by heart (validation {numbers}): {remedy}."
            yield Finding(False, text)


def _of_score(score: Score, *, run: RunData) -> Iterator[Finding]:
    """The findings of a row, if it is one of those that are judged."""
    value = score.value or 0.0
    judged = {
        "psnr": _reconstruction,
        "seams": _seams,
        "cider": _captions,
        "exact_match": _exact_captions,
        "clipscore_qlip": _prompt_match,
        "bits_per_byte": _text,
        "nearest_training": _memory,
    }
    if score.key == "skills/mean":
        yield Finding(value >= GOOD_SHARE, f"Six skills: {score.shown()} of {score.n} images show all that is asked.")
    elif score.metric in judged:
        yield from judged[score.metric](score, value, run)


def _reconstruction(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    source, _, stage = score.task.partition("_reconstruction_")
    if not _is_last(stage, run=run):
        return
    good = True if value >= GOOD_PSNR else None if value >= POOR_PSNR else False
    words = {True: "detail survives", None: "detail is lost", False: "only blurs"}[good]
    remedy = "" if good else ". No generated image can be sharper: train stages 1 and 2 longer, or use more patches"
    yield Finding(good, f"Reconstruction of {run.source_title(source)}: {score.shown()}, {words}{remedy}.")


def _is_last(stage: str, *, run: RunData) -> bool:
    """Whether a tokenizer is the last of those that were measured, or the only one that is known."""
    return stage == (run.parts["tokenizer"].samples.get("stages") or [stage])[-1]


def _seams(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    """A grid of patches, unless the reconstruction is so fine that nobody sees it."""
    source, _, stage = score.task.partition("_reconstruction_")
    psnr = run.scores.get(f"{score.task}/psnr")
    if _is_last(stage, run=run) and value > GRID_SEEN and psnr is not None and (psnr.value or 0.0) < FINE_PSNR:
        numbers = f"errors jump {value:.2f} times as much between patches as within"
        title, remedy = run.source_title(source), "set stage1.model.decoder_overlap=2"
        yield Finding(False, f"Reconstructions of {title} show a grid of patches, {numbers}: {remedy}.")


def _captions(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    """Captions against those of other images."""
    other = run.scores.get(f"{score.task}/cider_other_image")
    if other is None or other.value is None or f"{score.task}/exact_match" in run.scores:
        return
    title = run.source_title(score.task.removesuffix("_captions"))
    numbers = f"CIDEr {_range(score)}, {_range(other)} for the captions of other images{_few(score)}"
    if _is_above(score, other):
        yield Finding(True, f"Captions of {title} tell images apart: {numbers}.")
    else:
        yield Finding(False, f"No clear sign that captions of {title} depend on their image: {numbers}.")


def _exact_captions(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    title = run.source_title(score.task.removesuffix("_captions"))
    yield Finding(value >= GOOD_SHARE, f"Captions of {title}: {score.shown()} right to the word{_few(score)}.")


def _prompt_match(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    """Generated images between those of other prompts and the real ones, as the tokenizer's towers see them."""
    other, real = (run.scores.get(f"{score.task}/clipscore_qlip_{kind}") for kind in ("other", "real"))
    if other is None or other.value is None or real is None or real.value is None:
        return
    title = run.source_title(score.task.removesuffix("_generation"))
    numbers = f"{_range(score)}, {_range(other)} with other prompts, {_range(real)} for real images{_few(score)}"
    if not _is_above(real, other):
        remedy = "train stage 1 longer, or name a CLIP in generation.clip"
        yield Finding(None, f"Images of {title}: the tokenizer cannot judge them, prompt match {numbers}: {remedy}.")
    elif _is_above(score, other):
        yield Finding(True, f"Images of {title} differ with their prompts: prompt match {numbers}.")
    else:
        yield Finding(False, f"No clear sign that images of {title} differ with their prompts: prompt match {numbers}.")


def _memory(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    """Whether generated images are nearer to training images than real validation images are."""
    real = run.scores.get(f"{score.task}/nearest_training_real")
    if real is None or real.value is None:
        return
    title = run.source_title(score.task.removesuffix("_generation"))
    numbers = f"{score.shown()} of their bits are those of the nearest one, {real.shown()} for real images{_few(score)}"
    if _is_above(score, real):
        yield Finding(False, f"Images of {title} are nearer to training images than real ones: {numbers}.")
    else:
        yield Finding(
            True, f"Images of {title} are no nearer to training images than real ones, on average: {numbers}."
        )


def _text(score: Score, value: float, run: RunData) -> Iterator[Finding]:
    if value < LETTERS_BITS / 2:
        yield Finding(True, f"Text: {score.shown()} bits per byte of validation text.")
    else:
        what = "less than the frequency of letters" if value >= LETTERS_BITS else "little more than spelling"
        yield Finding(False, f"Text: {score.shown()} bits per byte of validation text: the model knows {what}.")


def _is_above(score: Score, other: Score) -> bool:
    """Whether a value lies above another one, both measured, by more than their intervals."""
    low = score.value if score.low is None else score.low
    high = other.value if other.high is None else other.high
    return low is not None and high is not None and low > high


def _range(score: Score) -> str:
    return f"{score.shown()} {score.shown_interval()}".strip()


def _few(score: Score) -> str:
    return f" (rough: only {score.n} images)" if score.n < FEW_ITEMS else ""
