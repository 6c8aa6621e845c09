"""Images made by strangers: every odd but valid file is read right, every bad one gives its reason."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from um3.core.images import FORMATS, ImageError, read_image, to_square


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """Smooth, so that lossy formats stay close."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises much and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_from_bytes_and_path(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(), kind)
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture"):
        image = read_image(source)
        assert image.mode == "RGB" and image.size == (40, 30)
        assert np.abs(pixels(image) - pixels(picture())).mean() < 8


def test_cmyk_keeps_its_colours() -> None:
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(pixels(read_image(data)) - pixels(picture())).mean() < 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))
    image = read_image(encoded(Image.fromarray(ramp), kind))
    np.testing.assert_array_equal(pixels(image)[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(pixels(image)[:, :, 0], pixels(image)[:, :, 2])


def test_pixels_of_unknown_range_are_refused() -> None:
    floats = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    integers = Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 1_000_000)
    for image in (floats, integers):
        with pytest.raises(ImageError) as caught:
            read_image(encoded(image, "TIFF"))
        assert caught.value.reason == "unsupported pixels"


def test_transparency_is_laid_on_white() -> None:
    clear_red = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    clear_red.putpixel((0, 0), (0, 0, 255, 255))
    clear_red.putpixel((1, 0), (0, 0, 0, 128))
    for image in (read_image(encoded(clear_red, kind)) for kind in ("PNG", "TIFF")):
        assert image.getpixel((0, 0)) == (0, 0, 255)
        assert image.getpixel((1, 0)) == (127, 127, 127)
        assert image.getpixel((5, 3)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(kind: str) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 255, 10, 200, 30])
    image.putpixel((0, 0), 0)
    read = read_image(encoded(image, kind, transparency=1))
    assert read.getpixel((0, 0)) == (0, 0, 255) and read.getpixel((3, 3)) == (255, 255, 255)


def test_grey_with_alpha_and_one_bit() -> None:
    assert read_image(encoded(Image.new("LA", (3, 3), (0, 0)), "PNG")).getpixel((1, 1)) == (255, 255, 255)
    assert read_image(encoded(Image.new("1", (3, 3), 1), "PNG")).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = read_image(encoded(picture(), kind, exif=exif))
    assert upright.size == (30, 40)
    assert np.abs(pixels(upright) - pixels(picture().transpose(Image.Transpose.ROTATE_270))).mean() < 8


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_costs_nothing() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00")
    assert read_image(data).size == (40, 30)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read_image(data).getpixel((4, 4)) == (255, 0, 0)


def reason(source: Path | bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)
    return caught.value.reason


def test_a_promised_giant_is_refused_from_its_header() -> None:
    assert reason(png_header(60_000, 60_000)) == "too large"
    assert reason(png_header(8_000, 8_000)) == "too large"
    assert reason(encoded(picture(), "PNG"), max_pixels=1_199) == "too large"
    assert read_image(encoded(picture(), "PNG"), max_pixels=1_200).size == (40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_truncated(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert reason(data[: len(data) // 2]) == "truncated"


def test_no_image_and_no_file(tmp_path: Path) -> None:
    assert reason(b"") == "not an image"
    assert reason(b"<html>not found</html>") == "not an image"
    assert reason(b"%PDF-1.7" + bytes(500)) == "not an image"
    assert reason(encoded(picture(), "ICO", sizes=[(16, 16)])) == "not an image"
    assert reason(tmp_path / "absent.png") == "cannot be read"
    assert reason(tmp_path) == "cannot be read"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_damage_gives_an_image_or_an_image_error() -> None:
    generator = np.random.default_rng(0)
    for kind in FORMATS:
        data = encoded(picture(24, 16), kind)
        for _ in range(60):
            broken = np.frombuffer(data, dtype=np.uint8).copy()
            places = generator.integers(0, len(broken), 6)
            broken[places] = generator.integers(0, 256, 6)
            try:
                assert read_image(broken.tobytes(), max_pixels=1_000_000).mode == "RGB"
            except ImageError as error:
                assert error.reason and str(error).startswith(error.reason)


def test_to_square_takes_the_middle() -> None:
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    square_HWC = to_square(wide, size=16)
    assert square_HWC.shape == (16, 16, 3) and square_HWC.dtype == np.uint8 and (square_HWC == 255).all()
    assert (to_square(wide.transpose(Image.Transpose.ROTATE_90), size=16) == 255).all()
    assert to_square(Image.new("RGB", (1, 1)), size=8).shape == (8, 8, 3)


def test_to_square_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    assert np.abs(to_square(Image.fromarray(stripes), size=8).astype(int) - 127).max() <= 12
