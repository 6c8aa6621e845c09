"""The images of a run that a report shows, each with its text and verdict; the page and the PNG figures share them."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from eval.report.run_folder import RunData

SKILL_TITLES = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colour",
    "position": "position",
    "color_attr": "colour of each",
}


class Tile(NamedTuple):
    """One image, uint8 (H, W, 3).

    `text` is its prompt or caption; `right` is the checker's verdict, None if there is none; `detail` gives the
    mistake: the unmet demands of a prompt, or the reference caption. `real` is the real image of a generated one.
    """

    image: NDArray
    text: str = ""
    right: bool | None = None
    detail: str = ""
    real: NDArray | None = None


class TileGroup(NamedTuple):
    """Tiles in the order in which they were measured; `note` is their score."""

    title: str
    tiles: list[Tile]
    note: str = ""


def skills(run: RunData) -> list[TileGroup]:
    """The generated images of each skill, with the checker's verdict."""
    images, samples = run.images.get("generation", {}), run.samples("generation").get("skills", [])
    groups = {skill: TileGroup(title, []) for skill, title in SKILL_TITLES.items()}
    for image, sample in zip(images.get("skills", ()), samples, strict=True):
        unmet = "not met: " + ", ".join(demand for demand, met in sample["demands_met"].items() if not met)
        groups[sample["skill"]].tiles.append(Tile(image, sample["prompt"], sample["passed"], unmet))
    scores = {skill: run.scores.get(f"skills/{skill}") for skill in groups}
    notes = {skill: f"{score.shown()} of {score.n}" if score else "" for skill, score in scores.items()}
    return [group._replace(note=notes[skill]) for skill, group in groups.items() if group.tiles]


def generated(run: RunData) -> list[TileGroup]:
    """The images generated for validation captions, by source, each with the real image of its caption."""
    images, groups = run.images.get("generation", {}), list[TileGroup]()
    for source, samples in run.samples("generation").get("captions", {}).items():
        triples = zip(images[f"{source}_drawn"], images[f"{source}_real"], samples, strict=False)
        groups.append(TileGroup(source, [Tile(image, sample["prompt"], real=real) for image, real, sample in triples]))
    return groups


def captions(run: RunData) -> list[TileGroup]:
    """Validation images with the model's captions, by source."""
    images, groups = run.images.get("captions", {}), list[TileGroup]()
    for source, samples in run.samples("captions").items():
        texts = [(sample["caption"] or "(empty)", sample["right"], sample["references"][0]) for sample in samples]
        groups.append(
            TileGroup(source, [Tile(image, *text) for image, text in zip(images[source], texts, strict=True)])
        )
    return groups


def reconstructions(run: RunData) -> dict[str, list[TileGroup]]:
    """By source: the validation images, then their reconstructions after each stage."""
    images, stages = run.images.get("tokenizer", {}), run.samples("tokenizer").get("stages", [])
    groups: dict[str, list[TileGroup]] = {}
    for source in [name.removesuffix("_original") for name in images if name.endswith("_original")]:
        groups[source] = []
        for kind in ("original", *stages):
            score = run.scores.get(f"{source}_reconstruction_{kind}/psnr")
            of_kind = [Tile(image) for image in images.get(f"{source}_{kind}", [])]
            groups[source].append(TileGroup(kind.replace("stage", "stage "), of_kind, score.shown() if score else ""))
    return groups


def best_generated(run: RunData) -> list[Tile]:
    """One image per skill, the first that passed if any did; without skills the first images of each source."""
    if by_skill := skills(run):
        return [next((tile for tile in group.tiles if tile.right), group.tiles[0]) for group in by_skill]
    return [tile for group in generated(run) for tile in group.tiles[:6]]


def best_captions(run: RunData) -> list[Tile]:
    """Right captions first, longest first, from every source in turn."""
    return _in_turn(
        [sorted(group.tiles, key=lambda tile: (not tile.right, -len(tile.text))) for group in captions(run)]
    )


def last_reconstructions(run: RunData) -> list[tuple[Tile, Tile]]:
    """(original, reconstruction after the last stage), from every source in turn."""
    groups = reconstructions(run).values()
    return _in_turn([list(zip(stages[0].tiles, stages[-1].tiles, strict=True)) for stages in groups])


def _in_turn(lists: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for items in itertools.zip_longest(*lists) for item in items if item is not None]
