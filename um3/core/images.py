"""Safe decoding of image files: a common format becomes a plain RGB image, anything else raises `ImageError`.

The size in the header is checked before anything is decoded. Colour profiles are not applied: the models are trained
on the values of the file, as their image processors read it at inference.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB of RGB, more than any photo used for training

ImageReason = Literal[
    "cannot be read", "not an image", "too large", "truncated", "cannot be decoded", "unsupported pixels"
]


class ImageError(Exception):
    """The bytes do not hold a usable image. `reason` is one of a few fixed phrases, for counting."""

    def __init__(self, reason: ImageReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: ImageReason = reason
        self.message = message


def read_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file or its bytes (PNG, JPEG, WEBP, GIF, BMP or TIFF) to an upright, opaque RGB image.

    The EXIF orientation is applied, transparency is laid on white, and 16-bit grey is scaled to 8 bits. An animation
    gives its first frame.

    Raises:
        ImageError: the file is damaged or unsupported, or has more than `max_pixels` pixels.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                size = f"{image.width} x {image.height}"
                raise ImageError("too large", f"{size} pixels exceed the limit of {max_pixels:,}")
            image.load()
            return _to_rgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image", f"the content is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too large", str(error)) from None
    except Exception as error:  # on hostile bytes decoders raise almost anything: struct.error, KeyError, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError("cannot be read", str(error)) from None
        reason: ImageReason = "truncated" if "truncated" in str(error).lower() else "cannot be decoded"
        raise ImageError(reason, f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF does not affect the pixels, which are decoded by now
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("unsupported pixels", "the range of floating-point pixels is unknown; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB. Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported pixels", "the range of 32-bit pixels is unknown; save as 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def to_square(image: Image.Image, *, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The largest centred square of an RGB image, resized by Pillow's antialiased filter: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: the filter of resize(box=...) would read pixels beyond the edge of the crop.
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), resample), dtype=np.uint8)
