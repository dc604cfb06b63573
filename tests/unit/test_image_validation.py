"""Image validation: conversion of unusual images, and rejection of invalid ones."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from topwork.data.images import image_validation
from topwork.data.images.decode_pool import DecodePool
from topwork.data.images.image_validation import Rejection, ValidatedImage, validate_image

RED, BLUE = (250, 10, 10), (10, 10, 250)


def _encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _red_and_blue(mode="RGB", size=(40, 24)):
    """An image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def _pixels(validated):
    with Image.open(io.BytesIO(validated.encoded)) as image:
        return image.format, image.mode, np.asarray(image)


def _decode_with_tensorflow(validated):
    from topwork.data.images.decoding import decode

    return decode(validated.encoded).numpy()


@pytest.mark.parametrize(
    "data",
    [
        _encode(_red_and_blue(), "JPEG", quality=95),
        _encode(_red_and_blue(), "JPEG", quality=95, progressive=True),
        _encode(_red_and_blue("L"), "JPEG"),
        _encode(_red_and_blue(), "MPO", save_all=True, append_images=[_red_and_blue()]),
        _encode(_red_and_blue(), "PNG"),
        _encode(_red_and_blue("L"), "PNG"),
    ],
    ids=["baseline JPEG", "progressive JPEG", "grayscale JPEG", "MPO", "PNG", "grayscale PNG"],
)
def test_validate_image_returns_a_normalized_file_unchanged(data):
    validated = validate_image(data)
    assert validated.encoded == data
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    # JPEG decoders differ slightly at color edges.
    assert np.abs(_decode_with_tensorflow(validated).astype(int) - expected).mean() < 2


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (_encode(_red_and_blue("CMYK"), "JPEG", quality=95), 12),
        (_encode(_red_and_blue("P"), "PNG"), 0),
        (_encode(_red_and_blue("P"), "GIF"), 0),
        (_encode(_red_and_blue(), "BMP"), 0),
        (_encode(_red_and_blue(), "TIFF"), 0),
        (_encode(_red_and_blue(), "WEBP", lossless=True), 0),
        (_encode(_red_and_blue("RGBA"), "PNG"), 0),
        (_encode(_red_and_blue("P"), "GIF", save_all=True, append_images=[Image.new("P", (40, 24))]), 0),
        (_encode(_red_and_blue("CMYK"), "TIFF"), 0),
    ],
    ids=["CMYK JPEG", "palette PNG", "GIF", "BMP", "TIFF", "WebP", "opaque alpha", "animated GIF", "CMYK TIFF"],
)
def test_validate_image_converts_other_formats_to_rgb_png(data, tolerance):
    kind, mode, pixels = _pixels(validate_image(data))
    assert (kind, mode, pixels.shape) == ("PNG", "RGB", (24, 40, 3))
    assert np.abs(pixels[12, 5].astype(int) - RED).max() <= tolerance
    assert np.abs(pixels[12, 35].astype(int) - BLUE).max() <= tolerance
    assert (_decode_with_tensorflow(validate_image(data)) == pixels).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_validate_image_applies_the_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = _red_and_blue()
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    data = _encode(upright.transpose(inverse[orientation]), "PNG", exif=exif)
    kind, _, pixels = _pixels(validate_image(data))
    assert kind == "PNG"
    assert (pixels == np.asarray(upright)).all()


def test_validate_image_composites_transparency_on_white():
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 10, 20))
    _, mode, pixels = _pixels(validate_image(_encode(image, "PNG")))
    assert (mode, pixels[5, 5].tolist(), pixels[5, 15].tolist()) == ("RGB", list(RED), [255, 255, 255])


def test_validate_image_composites_a_transparent_palette_color_on_white():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 10, 20))
    _, mode, pixels = _pixels(validate_image(_encode(image, "PNG", transparency=0)))
    assert (mode, pixels[5, 5].tolist(), pixels[5, 15].tolist()) == ("RGB", list(RED), [255, 255, 255])


def test_validate_image_keeps_16_bit_pixels():
    values = np.array([[0, 255, 256, 32768, 65535]] * 5, np.uint16)
    kind, mode, pixels = _pixels(validate_image(_encode(Image.fromarray(values), "TIFF")))
    assert (kind, mode) == ("PNG", "I;16")
    assert (pixels == values).all()


def test_validate_image_converts_1_bit_pixels_to_grayscale():
    kind, mode, pixels = _pixels(validate_image(_encode(Image.fromarray(np.eye(9, dtype=bool)), "PNG")))
    assert (kind, mode) == ("PNG", "L")
    assert (pixels == np.eye(9) * 255).all()


def _png_with_size(width, height):
    """A PNG file of a few bytes whose header declares the given size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"Not an image at all.", "unknown format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown format"),
        (_encode(_red_and_blue(size=(400, 400)), "JPEG")[:900], "truncated"),
        (_encode(Image.effect_noise((200, 200), 90), "PNG")[:20000], "truncated"),
        (_encode(_red_and_blue(), "PNG")[:41] + b"broken" + _encode(_red_and_blue(), "PNG")[47:], "undecodable"),
        (_png_with_size(100_000, 100_000), "too large"),
        (_png_with_size(8001, 8000), "too large"),
        (_encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "unknown format"),
        (_encode(Image.fromarray(np.array([[1, np.inf, -np.inf]], np.float32)), "TIFF"), "unknown format"),
    ],
    ids=[
        "empty",
        "text",
        "SVG",
        "truncated JPEG",
        "truncated PNG",
        "corrupt PNG",
        "decompression bomb",
        "8001x8000",
        "TIFF with NaN",
        "TIFF with infinity",
    ],
)
def test_validate_image_rejects_an_invalid_file_with_a_reason(data, reason):
    with pytest.raises(Rejection) as rejected:
        validate_image(data)
    assert rejected.value.reason == reason
    assert reason in image_validation.REASONS


def test_validate_image_rejects_a_file_above_the_size_limit_without_reading_it(monkeypatch):
    monkeypatch.setattr(image_validation, "MAX_BYTES", 100)
    with pytest.raises(Rejection) as rejected:
        validate_image(bytes(101))
    assert (rejected.value.reason, rejected.value.detail) == ("too large", "101 bytes, at most 100")


def test_validate_image_computes_a_digest_that_does_not_depend_on_the_encoding():
    assert (
        validate_image(_encode(_red_and_blue(), "PNG")).sha256 == validate_image(_encode(_red_and_blue(), "BMP")).sha256
    )
    assert (
        validate_image(_encode(_red_and_blue(), "PNG")).sha256
        != validate_image(_encode(_red_and_blue(size=(24, 40)), "PNG")).sha256
    )


def _crash_on_request(data: bytes, *, keep_encoding: bool) -> ValidatedImage:
    if data == b"crash":
        os.abort()
    return validate_image(data, keep_encoding=keep_encoding)


def test_decode_pool_rejects_an_image_that_crashes_its_worker_and_validates_the_others():
    valid = _encode(_red_and_blue(), "PNG")
    with DecodePool(_crash_on_request, workers=2) as pool:
        results = [result for _, result in pool.validate_all([valid, b"crash", valid, b"", valid], lambda data: data)]
    assert [getattr(result, "reason", "valid") for result in results] == [
        "valid",
        "decoder crashed",
        "valid",
        "empty",
        "valid",
    ]


def test_workers_start_quickly_because_they_import_only_pillow():
    script = "import sys, topwork.data.images.decode_pool; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "PIL" in modules
    assert not {"numpy", "boto3", "pydantic", "structlog", "tensorflow"} & set(modules)


def test_decode_pool_reencodes_a_damaged_file_that_only_pillow_can_decode():
    from topwork.data.images.decoding import is_decodable

    intact = _encode(_red_and_blue(), "PNG")
    damaged = intact[:-1] + b"\0"  # invalid CRC of the last chunk
    assert validate_image(damaged).encoded == damaged
    with DecodePool(is_decodable=is_decodable, workers=1) as pool:
        assert pool.validate(intact).encoded == intact
        assert (_decode_with_tensorflow(pool.validate(damaged)) == np.asarray(_red_and_blue())).all()
