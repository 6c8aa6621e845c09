"""Decoding: every valid file is read right, every bad one raises an ImageError with its reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from um3.core.images import FORMATS, ImageError, plain_rgb, read_image, to_square


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(image, kind, **options):
    """The image as it is read from a file of this kind."""
    return read_image(encoded(image, kind, **options))


def reason(source, **options):
    with pytest.raises(ImageError) as caught:
        read_image(source, **options)
    return caught.value.reason


def sample_image(width=40, height=30):
    """Smooth, so that lossy formats stay close."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=2).astype(np.uint8))


def mean_difference(first, second):
    return float(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).mean())


def png(width, height, *, depth=8, colour=2, pixels=b"", clear=b""):
    """A PNG of these values, which may be fewer than the header says; `clear` is the transparent colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    header += chunk(b"tRNS", clear) if clear else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_from_bytes_and_path(kind, tmp_path):
    data = encoded(sample_image(), kind)
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image"):
        image = read_image(source)
        assert image.mode == "RGB" and mean_difference(image, sample_image()) < 8


def test_cmyk_keeps_its_colours():
    assert mean_difference(decoded(sample_image().convert("CMYK"), "JPEG", quality=95), sample_image()) < 6


WHITE_AT_ZERO = {"tiffinfo": {262: 0}}


@pytest.mark.parametrize(("kind", "options", "step"), [("PNG", {}, 1), ("TIFF", {}, 1), ("TIFF", WHITE_AT_ZERO, -1)])
def test_16_bit_grey_is_scaled_not_clipped(kind, options, step):
    ramp = np.tile(np.arange(256, dtype=np.uint16) * 257, (4, 1))
    image_HWC = np.asarray(decoded(Image.fromarray(ramp), kind, **options))
    assert (image_HWC == np.arange(256)[None, ::step, None]).all()


def test_transparency_is_laid_on_white():
    clear_red = Image.new("RGBA", (6, 4), (255, 0, 0, 0))
    clear_red.putpixel((0, 0), (0, 0, 255, 255))
    clear_red.putpixel((1, 0), (0, 0, 0, 128))
    for image in (decoded(clear_red, kind) for kind in ("PNG", "TIFF")):
        assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 255), (127, 127, 127), (255, 255, 255)]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 10, 200, 30])
    palette.putpixel((0, 0), 0)
    for image in (decoded(palette, kind, transparency=1) for kind in ("PNG", "GIF")):
        assert image.getpixel((0, 0)) == (0, 0, 255) and image.getpixel((3, 3)) == (255, 255, 255)
    for other in (Image.new("LA", (3, 3), (0, 0)), Image.new("1", (3, 3), 1)):
        assert decoded(other, "PNG").getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("depth", "colour", "pixels", "clear", "expected"),
    [
        (1, 0, b"\x40", [0], [255, 255, 255, 255]),
        (2, 0, b"\x1b", [2], [0, 85, 255, 255]),
        (4, 0, b"\x3f\xf0", [3], [255, 255, 255, 0]),
        (16, 0, struct.pack(">4H", 1000, 1001, 65535, 0), [1000], [255, 4, 255, 0]),
        (16, 2, struct.pack(">12H", 9, 1, 1, 9, 2, 1, 0, 0, 0, 9, 1, 300), [9, 1, 1], [255, 0, 0, 0]),
        (16, 4, struct.pack(">8H", 30000, 65535, 30000, 0, 0, 32768, 65535, 65535), [], [117, 255, 127, 255]),
        (16, 6, struct.pack(">16H", *[30000] * 3, 65535, *[0] * 7, 65535, *[65535] * 4), [], [117, 255, 0, 255]),
    ],
)
def test_transparency_and_alpha_at_every_depth(depth, colour, pixels, clear, expected):
    data = png(4, 1, depth=depth, colour=colour, pixels=b"\0" + pixels, clear=struct.pack(f">{len(clear)}H", *clear))
    assert np.asarray(read_image(data))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
def test_large_metadata_of_a_png_does_not_cost_the_image(kind, tmp_path):
    info, options = PngImagePlugin.PngInfo(), {}
    if kind == "iTXt":
        info.add_itxt("workflow", "y" * 2**21, zip=True)
    elif kind == "iCCP":
        options["icc_profile"] = bytes(range(256)) * 2**13
    else:
        info.add_text("workflow", "x" * (2**21 if kind == "zTXt" else 2**26 + 1), zip=kind == "zTXt")
    data = encoded(sample_image(), "PNG", pnginfo=info, **options)
    (tmp_path / "image.png").write_bytes(data)
    for source in (data, tmp_path / "image.png"):
        assert mean_difference(read_image(source), sample_image()) == 0
    assert reason(data[: len(data) - 200]) == "truncated"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    upright = decoded(sample_image(), kind, exif=exif)
    assert mean_difference(upright, sample_image().transpose(Image.Transpose.ROTATE_270)) < 8
    assert plain_rgb(upright) is upright  # already upright: not turned again


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_is_ignored():
    exif = b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00"
    assert decoded(sample_image(), "JPEG", exif=exif).size == (40, 30)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_animation_gives_its_first_frame(kind, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    image = decoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert image.getpixel((4, 4)) == (255, 0, 0)


def test_a_giant_is_refused_from_its_header():
    assert reason(png(60_000, 60_000)) == reason(png(8_000, 8_000)) == "too large"
    assert reason(encoded(sample_image(), "PNG"), max_pixels=1_199) == "too large"
    assert read_image(encoded(sample_image(), "PNG"), max_pixels=1_200).size == (40, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_truncated_file(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert reason(data[: len(data) // 2]) == "truncated"


def test_other_files_have_their_reason(tmp_path):
    icon = encoded(sample_image(), "ICO", sizes=[(16, 16)])
    for content in (b"", b"<html>not found</html>", b"%PDF-1.7" + bytes(500), icon):
        assert reason(content) == "not an image"
    assert reason(tmp_path / "absent.png") == reason(tmp_path) == "cannot be read"
    floats = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    integers = np.arange(64, dtype=np.int32).reshape(8, 8)
    for values in (floats, integers, integers * 1_000_000):
        assert reason(encoded(Image.fromarray(values), "TIFF")) == "unsupported pixels"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_damage_gives_an_image_or_an_image_error():
    generator = np.random.default_rng(0)
    for kind in FORMATS:
        data = encoded(sample_image(24, 16), kind)
        for _ in range(60):
            broken = np.frombuffer(data, dtype=np.uint8).copy()
            places = generator.integers(0, len(broken), 6)
            broken[places] = generator.integers(0, 256, 6)
            try:
                assert read_image(broken.tobytes(), max_pixels=1_000_000).mode == "RGB"
            except ImageError as error:
                assert error.reason and str(error).startswith(error.reason)


def test_to_square_crops_the_centre_and_is_antialiased():
    wide = Image.new("RGB", (90, 30), "black")
    wide.paste("white", (30, 0, 60, 30))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        square_HWC = to_square(image, size=16)
        assert square_HWC.shape == (16, 16, 3) and square_HWC.dtype == np.uint8 and (square_HWC == 255).all()
    assert to_square(Image.new("RGB", (1, 1)), size=8).shape == (8, 8, 3)
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    assert np.abs(to_square(Image.fromarray(stripes), size=8).astype(int) - 127).max() <= 12
