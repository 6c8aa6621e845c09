"""Safe decoding of image files: a common format becomes a plain RGB image, anything else raises `ImageError`.

Colour profiles are not applied: models are trained on the values of the file, as image processors read it at inference.
"""

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB of RGB, more than any photo used for training
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF, and a value
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What undoes an EXIF orientation."""
ORIENTED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
"""Entries of a PIL image's `info` in which Pillow finds an orientation."""
ImageReason = Literal[
    "cannot be read", "not an image", "too large", "truncated", "cannot be decoded", "unsupported pixels"
]


REMEDIES: dict[ImageReason, str] = {
    "cannot be read": "check the path and its permissions",
    "not an image": f"give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file",
    "too large": "make it smaller",
    "truncated": "copy or download it again",
    "cannot be decoded": "copy or download it again",
    "unsupported pixels": "convert it to 8-bit RGB",
}


class ImageError(Exception):
    """The bytes do not hold a usable image. `reason` is one of a few fixed phrases, for counting."""

    def __init__(self, reason: ImageReason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: ImageReason = reason
        self.message = message

    @property
    def remedy(self) -> str:
        """What a person can do about it."""
        return REMEDIES[self.reason]


def read_image(source: Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file or its bytes (PNG, JPEG, WEBP, GIF, BMP or TIFF) to an upright, opaque RGB image.

    The EXIF orientation is applied, transparency is laid on white, and 16 bits are scaled to 8. An animation gives its
    first frame. Text and colour profiles of a PNG, of any size, are not read if Pillow refuses their size.
    ImageError: the file is damaged or unsupported, or has more than `max_pixels` pixels.
    """
    try:
        try:
            return _decode(source, max_pixels=max_pixels)
        except ValueError:  # Pillow's limits on text in a PNG, among others
            data = source if isinstance(source, bytes) else source.read_bytes()
            if not data.startswith(PNG_SIGNATURE):
                raise
            return _decode(_without_metadata(data), max_pixels=max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image", "the content has no known image format") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too large", str(error).rstrip(".")) from None
    except Exception as error:  # on hostile bytes decoders raise almost anything: struct.error, KeyError, ...
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError("cannot be read", str(error)) from None
        reason: ImageReason = "truncated" if "truncated" in str(error).lower() else "cannot be decoded"
        raise ImageError(reason, f"{type(error).__name__}: {error}") from error


def _decode(source: Path | bytes, *, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError("too large", f"{width} x {height} pixels exceed the limit of {max_pixels:,}")
        layout = image.tile[0].args if image.format == "PNG" and image.tile else ""
        image.load()
        orientation = _orientation(image)
        if layout in ("L;2", "L;4") and "transparency" in image.info:  # Pillow scales the pixels only
            image.info["transparency"] *= 255 // (2 ** int(layout[-1]) - 1)
        is_wide = layout == "RGB;16B" and "transparency" in image.info
        rgb = _clear_16_bits(source, image) if is_wide else _to_rgb(image)
    return _upright(rgb, orientation)


def plain_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as `read_image` gives it: upright, opaque RGB. One that is so already stays itself.

    ImageError: its pixels cannot be decoded, or have 32 bits.
    """
    try:
        image.load()
        rgb = image if image.mode == "RGB" and not image.has_transparency_data else _to_rgb(image)
        orientation = _orientation(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow decodes a file when its pixels are first needed, and raises almost anything
        raise ImageError("cannot be decoded", f"{type(error).__name__}: {error}") from error
    return _upright(rgb, orientation)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF does not affect the pixels
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned, without the entries that say so: it must not be turned again."""
    if orientation not in UPRIGHT:
        return image
    image = image.transpose(UPRIGHT[orientation])
    for name in ORIENTED_BY:
        image.info.pop(name, None)
    return image


def _without_metadata(data: bytes) -> bytes:
    """A PNG without the chunks that no pixel depends on."""
    parts, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if data[start + 4 : start + 8] not in PNG_METADATA:
            parts.append(data[start:end])
        start = end
    return b"".join(parts)


def _clear_16_bits(source: Path | bytes, image: Image.Image) -> Image.Image:
    """A 16-bit RGB with one transparent colour. Pillow keeps the high bytes; a second reading gives the low ones."""
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=["PNG"]) as low:
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        values_HWC = np.asarray(image).astype(np.int64) * 256 + np.asarray(low)
    is_clear_HW1 = (values_HWC == np.array(image.info["transparency"])).all(-1, keepdims=True)
    return Image.fromarray(np.where(is_clear_HW1, 255, np.asarray(image)).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("F", "I"):
        raise ImageError("unsupported pixels", "the range of 32-bit pixels is unknown; save as 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_integers(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits to RGB. Pillow's own conversion clips everything above 255 to white."""
    values, tags = np.asarray(image).astype(np.int64), getattr(image, "tag_v2", {})
    highest = 2 ** int(tags.get(BITS_PER_SAMPLE, (16,))[0]) - 1
    grey = (values * 255 + highest // 2) // highest
    grey = 255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def to_square(image: Image.Image, *, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """The largest centred square of an RGB image, resized by Pillow's antialiased filter: uint8 (size, size, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    # Cropped first: the filter of resize(box=...) would read pixels beyond the edge of the crop.
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((size, size), resample), dtype=np.uint8)
