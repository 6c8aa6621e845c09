"""The samples of a run that a report shows: images, each with its text and verdict, and items of the language part.

The page and the PNG figures share them. Samples of another form make the functions of `MAKERS` raise a LookupError,
TypeError, ValueError or AttributeError.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from eval.part_files import Part
from eval.scores import Score

SKILL_TITLES = {"single_object": "one object", "two_object": "two objects", "counting": "counting"}
SKILL_TITLES |= {"colors": "colour", "position": "position", "color_attr": "colour of each"}


NUM_GENERATED, NUM_CAPTIONS = 6, 3
"""Tiles in the figure at the top of a report."""
NO_CAPTION = "(empty)"


class Tile(NamedTuple):
    """One image, uint8 (H, W, 3).

    `text` is its prompt or caption; `right` is the checker's verdict, None if there is none; `detail` gives the
    mistake: the unmet demands of a prompt, or the reference caption. `real` is the real image of a generated one,
    `nearest` the training image that is most like it.
    """

    image: NDArray
    text: str = ""
    right: bool | None = None
    detail: str = ""
    real: NDArray | None = None
    nearest: NDArray | None = None


class TileGroup(NamedTuple):
    """Tiles in the order in which they were measured; `note` is their score, `source` that of their images."""

    title: str
    tiles: list[Tile]
    note: str = ""
    source: str = ""


def skills(part: Part, scores: Mapping[str, Score]) -> list[TileGroup]:
    """The generated images of each skill, with the checker's verdict."""
    groups = {skill: TileGroup(title, []) for skill, title in SKILL_TITLES.items()}
    samples = part.samples.get("skills", [])
    for image, sample in zip(part.images.get("skills", ()), samples, strict=True):
        unmet = "not met: " + ", ".join(demand for demand, met in sample["demands_met"].items() if not met)
        groups[sample["skill"]].tiles.append(Tile(image, str(sample["prompt"]), bool(sample["passed"]), unmet))
    measured = {skill: scores.get(f"skills/{skill}") for skill in groups}
    notes = {skill: f"{score.shown()} of {score.n}" if score else "" for skill, score in measured.items()}
    return [group._replace(note=notes[skill]) for skill, group in groups.items() if group.tiles]


def generated(part: Part, _: Mapping[str, Score]) -> list[TileGroup]:
    """The images generated for validation captions, by source, each with the real image of its caption."""
    groups = []
    for source, samples in part.samples.get("captions", {}).items():
        drawn = part.images[f"{source}_drawn"]
        nearest = part.images.get(f"{source}_nearest", [None] * len(drawn))
        rows = zip(drawn, part.images[f"{source}_real"], nearest, samples, strict=False)
        tiles = [Tile(image, str(sample["prompt"]), real=real, nearest=near) for image, real, near, sample in rows]
        groups.append(TileGroup(source, tiles))
    return groups


def captions(part: Part, _: Mapping[str, Score]) -> list[TileGroup]:
    """Validation images with the model's captions, by source."""
    groups = []
    for source, samples in part.samples.items():
        texts = [(str(s["caption"]) or NO_CAPTION, s.get("right"), str(s["references"][0])) for s in samples]
        tiles = [Tile(image, *text) for image, text in zip(part.images[source], texts, strict=True)]
        groups.append(TileGroup(source, tiles))
    return groups


def reconstructions(part: Part, scores: Mapping[str, Score]) -> list[TileGroup]:
    """For each source the validation images, then their reconstructions after each stage."""
    groups = []
    for source in [name.removesuffix("_original") for name in part.images if name.endswith("_original")]:
        for kind in ("original", *part.samples.get("stages", [])):
            score = scores.get(f"{source}_reconstruction_{kind}/psnr")
            name = f"{source}_{kind}"  # absent for an external tokenizer of another image size
            tiles = [Tile(image) for image in part.images.get(name, ())]
            groups.append(TileGroup(kind.replace("stage", "stage "), tiles, score.shown() if score else "", source))
    return groups


def prompts(part: Part, _: Mapping[str, Score]) -> list[dict[str, Any]]:
    """The first item of each benchmark, as the model reads it."""
    return [{"task": task, **item} for task, item in part.samples.get("prompts", {}).items()]


def cloze(part: Part, _: Mapping[str, Score]) -> list[dict[str, Any]]:
    """The first questions of the cloze test."""
    return [{**item, "choices": list(item["choices"])} for item in part.samples.get("cloze", [])]


MAKERS: dict[str, tuple[str, Any]] = {
    "skills": ("generation", skills),
    "generated": ("generation", generated),
    "captions": ("captions", captions),
    "reconstructions": ("tokenizer", reconstructions),
    "prompts": ("language", prompts),
    "cloze": ("language", cloze),
}
"""By name: the part that has these samples, and the function that makes them."""

Shown = Mapping[str, Sequence[TileGroup]]


def best_generated(shown: Shown) -> list[Tile]:
    """One image per skill, the first that passed if any did; without skills the first images of each source."""
    if by_skill := shown["skills"]:
        return [next((tile for tile in group.tiles if tile.right), group.tiles[0]) for group in by_skill]
    return [tile for group in shown["generated"] for tile in group.tiles[:6]]


def best_captions(shown: Shown) -> list[Tile]:
    """Right captions first, longest first, from every source in turn; in order where nothing says which are right."""

    def rank(tile: Tile) -> tuple[bool, int]:
        return (not tile.right, -len(tile.text)) if tile.right is not None else (True, 0)

    return _in_turn([sorted(group.tiles, key=rank) for group in shown["captions"]])


def selection_note(shown: Shown) -> str:
    """How the tiles of the figure at the top were chosen, and whether those that can be judged are right."""
    tiles = [*best_generated(shown)[:NUM_GENERATED], *best_captions(shown)[:NUM_CAPTIONS]]
    judged = [tile.right for tile in tiles if tile.right is not None]
    if not judged:
        return "The first validation images and captions, not selected."
    if all(judged):
        return "Selected successes. Everything below is in order, failures included."
    wrong = f"{judged.count(False)} of these {len(judged)} are wrong (red)"
    return f"The best of the first ones of each kind; {wrong}. Everything below is in order."


def last_reconstructions(shown: Shown) -> list[tuple[Tile, Tile]]:
    """(original, reconstruction after the last stage), from every source in turn."""
    by_source = itertools.groupby(shown["reconstructions"], key=lambda group: group.source)
    sources = [list(groups) for _, groups in by_source]
    return _in_turn([list(zip(groups[0].tiles, groups[-1].tiles, strict=False)) for groups in sources])


def _in_turn(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for items in itertools.zip_longest(*lists) for item in items if item is not None]
