"""Reading images that strangers made: any common file becomes a plain RGB image, or one kind of error.

Nothing is decoded before the header's size has been checked. Colour profiles are not applied (the models are
trained on what the files say, as their image processors do at inference).
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB of RGB; no photo used for training comes near

ImageReason = Literal[
    "cannot be read", "not an image", "too large", "truncated", "cannot be decoded", "unsupported pixels"
]


class ImageError(Exception):
    """The bytes do not give an image. `reason` is one of a few fixed phrases, fit for counting."""

    def __init__(self, reason: ImageReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: ImageReason = reason
        self.message = message


def read_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file or its bytes (PNG, JPEG, WEBP, GIF, BMP or TIFF) to an RGB image, upright and opaque.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey is scaled to 8, and of an
    animation the first frame is taken.

    Raises:
        ImageError: for whatever is wrong with it, and for more than `max_pixels` pixels.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not an image", f"the content is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too large", str(error)) from None
    except OSError as error:
        raise ImageError("cannot be read", str(error)) from None
    except Exception as error:
        # Decoders fed with hostile bytes raise almost anything: struct.error, KeyError, OverflowError, ...
        raise ImageError("cannot be decoded", _describe(error)) from error
    with image:
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height}"
            raise ImageError("too large", f"{size} pixels are more than the {max_pixels:,} allowed")
        try:
            image.load()
            return _to_rgb(_upright(image))
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError("too large", str(error)) from None
        except Exception as error:
            if "truncated" in str(error).lower():
                raise ImageError("truncated", str(error)) from error
            raise ImageError("cannot be decoded", _describe(error)) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing about the pixels, and those are fine by now
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("unsupported pixels", "floating-point pixels have no known range; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit grey to RGB. Pillow's own conversion clips everything above 255 to white."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError("unsupported pixels", "32-bit pixels have no known range; save as 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def to_square(image: Image.Image, *, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The largest centred square of an RGB image, resized by Pillow's antialiased filter: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: with resize(box=...) the filter would reach over the edge into what is cut away.
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), resample), dtype=np.uint8)
