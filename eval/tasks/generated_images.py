"""A folder of generated images and its manifest, which names the files and seeds of every prompt.

    flat      00000.png, or 00000_0.png to 00000_3.png: COCO-30k and `make eval`
    geneval   00000/metadata.jsonl and 00000/samples/0000.png to 0003.png: the layout of GenEval's own scripts
    grid      ID.png with up to four images, two per row: the layout of DPG-Bench's own script

manifest.json also holds the protocol and a hash of the model. Folders with equal manifests have equal images.

Shapes: N images, H height, W width.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.tasks.prompts import Prompt
from um3.core.config import differences
from um3.core.errors import UserError
from um3.core.files import PARTIAL_SUFFIX, read_json, walk_files, write_json, write_text
from um3.core.images import SUFFIXES
from um3.core.metrics import commit, versions

Layout = Literal["flat", "geneval", "grid"]
MANIFEST = "manifest.json"
GRID_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Row and column of each image of a grid, in DPG-Bench's order."""


class GeneratedPrompt(NamedTuple):
    """A prompt, the files of its images (relative to the folder), and the seed of each image."""

    id: str
    prompt: str
    files: list[str]
    seeds: list[int]


class GeneratedFolder(NamedTuple):
    """The content of a manifest.

    protocol: the settings that two folders must share to be comparable. pins: the seeds and the model's hash, in which
    they may differ. Both are empty for images from other programs.
    """

    protocol: dict[str, Any]
    pins: dict[str, Any]
    prompts: list[GeneratedPrompt]

    @property
    def seed(self) -> int:
        """The seed of the images; 0 if it is unknown."""
        return int(self.pins.get("seed", 0))


def image_files(layout: Layout, *, index: int, prompt_id: str, num_images: int) -> list[str]:
    """The files of a prompt's images, relative to the folder."""
    if layout == "grid":
        return [f"{prompt_id}.png"]
    if layout == "geneval":
        return [f"{index:05d}/samples/{copy:04d}.png" for copy in range(num_images)]
    return [f"{index:05d}.png"] if num_images == 1 else [f"{index:05d}_{copy}.png" for copy in range(num_images)]


def write_images(
    folder: Path, *, layout: Layout, files: Sequence[str], images: Sequence[NDArray], prompt: Prompt
) -> None:
    """Write a prompt's images (H, W, 3) uint8. A file is complete or absent after a kill.

    Files are not synced to disk, which would take 14 ms per image, so this does not hold after a power failure.
    """
    from um3.inference.image_io import png_bytes

    if layout == "geneval":
        write_text(folder / Path(files[0]).parents[1] / "metadata.jsonl", prompt.line + "\n")
    for file, image in zip(files, [grid(images)] if layout == "grid" else images, strict=True):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(PARTIAL_SUFFIX)
        partial.write_bytes(png_bytes(image))
        os.replace(partial, path)


def grid(images: Sequence[NDArray]) -> NDArray:
    """Up to four square images in one of twice their side; empty places are black."""
    side = len(images[0])
    sheet = np.zeros((2 * side, 2 * side, 3), dtype=np.uint8)
    for image, (row, column) in zip(images, GRID_PLACES, strict=False):
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = image
    return sheet


def read_images(folder: Path, generated: GeneratedFolder) -> NDArray:
    """All images of a folder in the manifest's order, uint8 (N, H, W, 3); they must have one size."""
    files = [folder / file for prompt in generated.prompts for file in prompt.files]
    return np.stack([np.asarray(Image.open(file, formats=["PNG"]).convert("RGB")) for file in files])


def check_manifest(folder: Path, generated: GeneratedFolder) -> bool:
    """Whether the folder has a manifest, which must then be that of `generated`; UserError if it holds other images."""
    if has_manifest(folder):
        stored = read_manifest(folder)
        if changes := "; ".join(differences(stored.protocol | stored.pins, generated.protocol | generated.pins)):
            raise UserError(f"the images in {folder} have other settings ({changes}); use another output folder")
        return True
    if folder.is_dir() and walk_files(folder, suffixes=SUFFIXES):
        raise UserError(f"{folder} contains images but no {MANIFEST}; use an empty output folder")
    return False


def write_manifest(folder: Path, generated: GeneratedFolder, **origin: Any) -> None:
    """Write the manifest, with `origin`, the commit and the package versions for information."""
    about = {"protocol": generated.protocol, "pins": generated.pins, **origin, "commit": commit()}
    prompts = [prompt._asdict() for prompt in generated.prompts]
    write_json(folder / MANIFEST, {**about, "versions": versions(), "prompts": prompts})


def read_manifest(folder: str | Path) -> GeneratedFolder:
    """Read a folder's manifest; UserError if it is missing or damaged."""
    path = Path(folder) / MANIFEST
    content = read_json(path)
    try:
        prompts = [GeneratedPrompt(**prompt) for prompt in content["prompts"]]
        return GeneratedFolder(content["protocol"], content["pins"], prompts)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder and generate the images again") from None


def has_manifest(folder: str | Path) -> bool:
    """Whether the images of a folder come from `eval.tasks.generate_images`."""
    return (Path(folder) / MANIFEST).is_file()
