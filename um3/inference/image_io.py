"""Images for people: PNG files with metadata, contact sheets with labels, codes as colours.

Shapes: N patches, H height, W width.
"""

import io
import itertools
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from um3.core.errors import UserError
from um3.core.files import atomic_file
from um3.core.images import ImageError, plain_rgb, read_image

ImageInput = Image.Image | str | Path
Images = np.ndarray | ImageInput | Sequence[ImageInput]
"""uint8 (B, H, W, 3) of the model's size, or PIL images or paths of image files, one or several."""
MIN_SIDE, MARGIN = 256, 12
FONT_SIZE, MAX_LABEL_LINES = 15, 3
METADATA = "um3"
"""Name of the PNG text entry that describes how an image was generated, as JSON."""


def to_pil(image_HW3: np.ndarray, *, metadata: Mapping[str, Any] | None = None) -> Image.Image:
    """A uint8 array (H, W, 3) as a PIL image with `metadata`, which `save_png` writes to the file."""
    image = Image.fromarray(image_HW3)
    if metadata is not None:
        image.info[METADATA] = json.dumps(metadata, ensure_ascii=False)
    return image


def open_images(images: Images) -> np.ndarray | list[Image.Image]:
    """An array as it is; else RGB images, those of paths read. UserError names what is no image, or cannot be read."""
    if isinstance(images, np.ndarray):
        return images
    several = [images] if isinstance(images, str | Path | Image.Image) else images
    return [open_image(image, where=f"image {number}") for number, image in enumerate(several, start=1)]


def open_image(image: ImageInput, *, where: str) -> Image.Image:
    """A PIL image, or the one in a file, as plain RGB; `where` begins the message of a UserError."""
    if not isinstance(image, str | Path | Image.Image):
        raise UserError(f"{where} is a {type(image).__name__}; give a PIL image or a path")
    try:
        return plain_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
    except ImageError as error:
        place = where if isinstance(image, Image.Image) else f"{where}: {image}"
        raise UserError(f"{place}: {error}; {error.remedy}") from None


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """A PIL image with its metadata, or a uint8 array (H, W, 3), as PNG."""
    image = image if isinstance(image, Image.Image) else to_pil(image)
    text, buffer = PngInfo(), io.BytesIO()
    if METADATA in image.info:
        text.add_itxt(METADATA, image.info[METADATA])
    image.save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


def save_png(image: Image.Image | np.ndarray, path: str | Path) -> None:
    """Write `png_bytes` to a file, atomically."""
    with atomic_file(path) as partial:
        partial.write_bytes(png_bytes(image))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote; UserError for any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return dict(json.loads(image.info[METADATA]))
    except (OSError, ValueError, TypeError, SyntaxError, KeyError) as error:
        reason = f"no text entry '{METADATA}'" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a PNG with the metadata of UM3: {reason}") from None


def image_metadata(image: Image.Image) -> dict[str, Any]:
    """The metadata of a generated PIL image, or of one that was read from its PNG; empty for any other image."""
    try:
        return dict(json.loads(image.info[METADATA]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def enlarge(image_HW3: np.ndarray) -> Image.Image:
    """Scale a small image up to MIN_SIDE on its shorter side: in whole pixels from a factor of 2, else smoothly."""
    image = Image.fromarray(image_HW3)
    factor = MIN_SIDE / min(image.size)
    if factor <= 1:
        return image
    resample = Image.Resampling.BICUBIC if factor < 2 else Image.Resampling.NEAREST
    factor = factor if factor < 2 else math.ceil(factor)
    return image.resize((round(image.width * factor), round(image.height * factor)), resample)


def contact_sheet(
    images: np.ndarray | Sequence[np.ndarray], *, labels: Sequence[str] = (), columns: int = 0
) -> Image.Image:
    """All images on one white sheet, row by row, each above its label; `columns` 0 makes it about square."""
    if not len(images):
        raise ValueError("a contact sheet needs at least one image")
    tiles = [enlarge(image) for image in images]
    columns = min(columns or math.ceil(math.sqrt(len(tiles))), len(tiles))
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    font = ImageFont.load_default(size=FONT_SIZE)
    characters = max(8, int(width / font.getlength("n")))
    wrapping: dict[str, Any] = {"width": characters, "max_lines": MAX_LABEL_LINES, "placeholder": " ..."}
    texts = ["\n".join(textwrap.wrap(label, **wrapping)) for label in labels]
    line_height = FONT_SIZE + 4
    label_height = max((text.count("\n") + 1 for text in texts), default=0) * line_height
    rows = math.ceil(len(tiles) / columns)
    cell_width, cell_height = width + MARGIN, height + label_height + MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for index, tile in enumerate(tiles):
        left = MARGIN + index % columns * cell_width
        top = MARGIN + index // columns * cell_height
        sheet.paste(tile, (left, top))
        if index < len(texts):
            draw.multiline_text((left, top + height + 3), texts[index], fill="black", font=font, spacing=4)
    return sheet


def code_image(codes_N: Tensor, *, num_bits: int) -> np.ndarray:
    """The codes of a square image as an image of one pixel per patch: uint8 (side, side, 3).

    Red, green and blue are the first, second and last third of the bits read as a number: equal codes have equal
    colours, and codes that differ in late bits of a third have similar ones.
    """
    side = math.isqrt(len(codes_N))
    if side * side != len(codes_N):
        raise ValueError(f"{len(codes_N)} codes do not form a square")
    codes, channels = codes_N.cpu().numpy(), []
    for start, end in itertools.pairwise(num_bits * part // 3 for part in range(4)):
        values = codes >> (num_bits - end) & (1 << (end - start)) - 1
        channels.append(np.round(values * (255 / max((1 << (end - start)) - 1, 1))).astype(np.uint8))
    return np.stack(channels, axis=-1).reshape(side, side, 3)
