"""A folder of drawn images: which files belong to which prompt, and how they were made.

    flat      00000.png, or 00000_0.png .. 00000_3.png: COCO-30k
    geneval   00000/metadata.jsonl and 00000/samples/0000.png .. 0003.png: what GenEval's own scripts read
    grid      ID.png with up to four images, two in a row: what DPG-Bench's own script reads

manifest.json names every prompt with its files and seeds, the protocol and the model: where all of them are equal, so
are the images.

Shapes: H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.benchmarks.prompts import Prompt
from um3.core.config import differences
from um3.core.errors import UserError
from um3.core.files import read_json, write_json
from um3.core.images import SUFFIXES
from um3.core.provenance import commit, versions

Layout = Literal["flat", "geneval", "grid"]
MANIFEST = "manifest.json"
GRID_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row and column of each image of a grid, in DPG-Bench's order."""


class DrawnPrompt(NamedTuple):
    """A prompt with the files (names below the folder) of its images, and each image's seed."""

    id: str
    prompt: str
    files: list[str]
    seeds: list[int]


def image_files(layout: Layout, *, index: int, prompt_id: str, num_images: int) -> list[str]:
    """Where the images of a prompt go."""
    if layout == "grid":
        return [f"{prompt_id}.png"]
    if layout == "geneval":
        return [f"{index:05d}/samples/{copy:04d}.png" for copy in range(num_images)]
    return [f"{index:05d}.png"] if num_images == 1 else [f"{index:05d}_{copy}.png" for copy in range(num_images)]


def write_images(
    folder: Path, *, layout: Layout, files: Sequence[str], images: Sequence[NDArray], prompt: Prompt
) -> None:
    """Write a prompt's images (H, W, 3) uint8; every file is whole or absent."""
    from um3.core.files import write_text
    from um3.inference.image_io import save_png

    if layout == "grid":
        images = [grid(images)]
    if layout == "geneval":
        write_text(folder / Path(files[0]).parents[1] / "metadata.jsonl", prompt.line + "\n")
    for file, image in zip(files, images, strict=True):
        save_png(image, folder / file)


def grid(images: Sequence[NDArray]) -> NDArray:
    """Up to four square images as one of twice their side; empty places are black."""
    side = len(images[0])
    sheet = np.zeros((2 * side, 2 * side, 3), dtype=np.uint8)
    for image, (row, column) in zip(images, GRID_PLACES, strict=False):
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = image
    return sheet


class DrawnFolder(NamedTuple):
    """What a manifest says. `protocol`: the settings that two drawings must share to be comparable; `pins`: seed, seeds
    and model, which differ between them. Both empty for images of another origin."""

    protocol: dict[str, Any]
    pins: dict[str, Any]
    prompts: list[DrawnPrompt]

    @property
    def seed(self) -> int:
        """The seed of the drawing, 0 where it is not known."""
        return int(self.pins.get("seed", 0))


def claim(folder: Path, *, drawn: DrawnFolder, write: bool, **more: Any) -> None:
    """Make a folder one of this drawing, or see that it is: `write` on the one rank that makes it. `more` is noted
    with the commit and the versions of packages, and may differ another time.

    Raises:
        UserError: the folder is of another drawing, or holds images of unknown origin.
    """
    path = folder / MANIFEST
    if path.is_file():
        there = read_drawn(folder)
        if changed := differences(there.protocol | there.pins, drawn.protocol | drawn.pins):
            raise UserError(f"{folder} was drawn otherwise ({'; '.join(changed)}); draw into another folder")
    elif folder.is_dir() and any(file.suffix.lower() in SUFFIXES for file in folder.iterdir()):
        raise UserError(f"{folder} holds images and no {MANIFEST}; draw into an empty folder")
    elif write:
        prompts = [prompt._asdict() for prompt in drawn.prompts]
        about = {**more, "commit": commit(), "versions": versions()}
        write_json(path, {"protocol": drawn.protocol, "pins": drawn.pins, **about, "prompts": prompts})


def read_drawn(folder: str | Path) -> DrawnFolder:
    """The manifest of a folder that `claim` made.

    Raises:
        UserError: no such folder, no manifest in it, or a damaged one.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UserError(f"no {MANIFEST} in {folder}; draw the images with python -m eval generate-images")
    content = read_json(path)
    try:
        return DrawnFolder(content["protocol"], content["pins"], [DrawnPrompt(**each) for each in content["prompts"]])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it and draw again into another folder") from None


def has_manifest(folder: str | Path) -> bool:
    """Whether the images in it are drawn by `eval.benchmarks.generate_images`."""
    return (Path(folder) / MANIFEST).is_file()
