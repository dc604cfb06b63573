"""Decoding in a TensorFlow graph: the same pixels as Pillow's for every file, or an error."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from topwork.data.images.decoding import decode
from topwork.data.images.image_validation import validate_image

PHOTO = np.asarray(Image.radial_gradient("L").resize((60, 40)))
COLORS = np.dstack([PHOTO, PHOTO[::-1], PHOTO[:, ::-1]])
RGB = Image.fromarray(COLORS)
RGBA = Image.fromarray(np.dstack([COLORS, np.linspace(0, 255, 60).astype(np.uint8) * np.ones((40, 1), np.uint8)]))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int, *, little: bool) -> bytes:
    """An EXIF block with two entries, of which the second is the orientation."""
    order = "<" if little else ">"
    entries = struct.pack(f"{order}HHIHHHHIHH", 0x0100, 3, 1, 5, 0, 0x0112, 3, 1, orientation, 0)
    header = (b"II*\0" if little else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + header + struct.pack(f"{order}H", 2) + entries + bytes(4)


def all_blends() -> Image.Image:
    """Every pair of a value and an alpha."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    return Image.fromarray(np.dstack([value, value[::-1], value.T, alpha]).astype(np.uint8))


SERVABLE = {
    "JPEG": encode(RGB, "JPEG", quality=60),
    "progressive JPEG": encode(RGB, "JPEG", progressive=True),
    "JPEG 4:4:4": encode(RGB, "JPEG", subsampling=0),
    "JPEG with comment": encode(RGB, "JPEG", comment=b"x" * 60000),
    "grayscale JPEG": encode(RGB.convert("L"), "JPEG"),
    "CMYK JPEG": encode(RGB.convert("CMYK"), "JPEG"),
    "PNG": encode(RGB, "PNG"),
    "grayscale PNG": encode(RGB.convert("L"), "PNG"),
    "1-bit PNG": encode(RGB.convert("1"), "PNG"),
    "2-bit palette PNG": encode(RGB.quantize(4), "PNG"),
    "4-bit palette PNG": encode(RGB.quantize(16), "PNG"),
    "transparent palette PNG": encode(RGB.quantize(4), "PNG", transparency=1),
    "palette PNG with alpha": encode(RGB.quantize(16), "PNG", transparency=bytes(range(0, 160, 10))),
    "PNG with transparent gray": encode(RGB.convert("L"), "PNG", transparency=int(PHOTO[0, 0])),
    "PNG with transparent color": encode(RGB, "PNG", transparency=tuple(map(int, COLORS[3, 3]))),
    "RGBA PNG": encode(RGBA, "PNG"),
    "LA PNG": encode(RGBA.convert("LA"), "PNG"),
    "PNG with every blend": encode(all_blends(), "PNG"),
    "lossy WebP": encode(RGB, "WEBP"),
    "lossless WebP": encode(RGB, "WEBP", lossless=True),
    "transparent WebP": encode(RGBA, "WEBP"),
    "GIF": encode(RGB, "GIF"),
    "animated GIF": encode(RGB, "GIF", save_all=True, append_images=[Image.new("RGB", RGB.size, "red")]),
    "BMP": encode(RGB, "BMP"),
    "grayscale BMP": encode(RGB.convert("L"), "BMP"),
    "palette BMP": encode(RGB.quantize(200), "BMP"),
    "32-bit BMP": encode(RGBA, "BMP"),
    **{
        f"{kind} with {'little' if little else 'big'} endian orientation {orientation}": encode(
            RGBA if kind == "PNG" else RGB, kind, exif=exif(orientation, little=little)
        )
        for kind in ("JPEG", "PNG", "WEBP")
        for orientation in (1, 3, 5, 6, 8, 9)
        for little in (True, False)
    },
}


@pytest.mark.parametrize("name", SERVABLE)
def test_source_file_is_decoded_like_its_stored_image(name):
    stored = validate_image(SERVABLE[name]).encoded
    pixels = decode(SERVABLE[name]).numpy()
    with Image.open(io.BytesIO(stored)) as image:
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert np.array_equal(pixels, decode(stored).numpy())


def test_orientation_is_applied():
    rotated = encode(RGB.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif(6, little=True))
    assert np.array_equal(decode(rotated).numpy(), COLORS)


@pytest.mark.parametrize(
    "data",
    [
        encode(RGB, "TIFF"),
        encode(RGB.quantize(64), "GIF", transparency=5),
        encode(RGB, "WEBP", save_all=True, append_images=[Image.new("RGB", RGB.size, "red")]),
        encode(RGB.convert("1"), "BMP"),
        encode(RGB, "PPM"),
        b"",
        b"BM",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBP",
        encode(RGB, "JPEG")[:300],
    ],
    ids=["TIFF", "transparent GIF", "animated WebP", "1-bit BMP", "PPM", "empty", *["header only"] * 5, "truncated"],
)
def test_file_that_cannot_be_decoded_exactly_is_an_error(data):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(data)


def png_16_bit(values: np.ndarray, color_type: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def tiff_16_bit(values: np.ndarray, photometric: int = 2, order: str = "<", planar: int = 1) -> bytes:
    """An uncompressed TIFF file with 16 bits per channel, (height, width, channels)."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    short, long = 3, 4
    entries = [
        (256, long, 1, width), (257, long, 1, height), (258, short, channels, 0), (259, short, 1, 1),
        (262, short, 1, photometric), (273, long, 1, 0), (277, short, 1, channels), (278, long, 1, height),
        (279, long, 1, len(pixels)), (284, short, 1, planar),
    ]  # fmt: skip
    bits_at = 8 + 2 + 12 * len(entries) + 4
    pixels_at = bits_at + 2 * channels
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        if tag == 258:
            value = bits_at if channels > 2 else 16  # noqa: PLW2901
            kind_code = "I" if channels > 2 else "H2x"
        else:
            value = pixels_at if tag == 273 else value  # noqa: PLW2901
            kind_code = "I" if kind == long else "H2x"
        directory += struct.pack(f"{order}HHI{kind_code}", tag, kind, count, value)
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return header + directory + bytes(4) + struct.pack(f"{order}{channels}H", *[16] * channels) + pixels


VALUES = np.linspace(0, 4095, 40 * 60 * 4).astype(np.uint16).reshape(40, 60, 4)
GRAY, OPAQUE = VALUES[..., 0], np.full((40, 60), 65535, np.uint16)
RANGE = (0.0, 4095.0)
EXPECTED = np.round(VALUES / 4095 * 255).astype(np.uint8)
GRAY_EXPECTED = np.repeat(EXPECTED[..., :1], 3, axis=-1)
DEEP = {
    "16-bit TIFF": (encode(Image.fromarray(GRAY), "TIFF"), GRAY_EXPECTED),
    "LZW TIFF": (encode(Image.fromarray(GRAY), "TIFF", compression="tiff_lzw"), GRAY_EXPECTED),
    "big-endian TIFF": (tiff_16_bit(GRAY[..., np.newaxis], 1, ">"), GRAY_EXPECTED),
    "inverted TIFF": (encode(Image.fromarray(GRAY), "TIFF", tiffinfo={262: 0}), None),
    "32-bit TIFF": (encode(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), GRAY_EXPECTED),
    "float TIFF": (encode(Image.fromarray(GRAY.astype(np.float32)), "TIFF"), GRAY_EXPECTED),
    "RGB TIFF": (tiff_16_bit(VALUES[..., :3]), EXPECTED[..., :3]),
    "big-endian RGB TIFF": (tiff_16_bit(VALUES[..., :3], order=">"), EXPECTED[..., :3]),
    "16-bit PNG": (encode(Image.fromarray(GRAY), "PNG"), GRAY_EXPECTED),
    "RGB PNG": (png_16_bit(VALUES[..., :3], 2), EXPECTED[..., :3]),
    "RGBA PNG": (png_16_bit(np.dstack([VALUES[..., :3], OPAQUE]), 6), EXPECTED[..., :3]),
    "gray PNG with alpha": (png_16_bit(np.dstack([GRAY, OPAQUE]), 4), GRAY_EXPECTED),
    "transparent gray PNG": (png_16_bit(np.dstack([GRAY, 0 * OPAQUE]), 4), np.full_like(GRAY_EXPECTED, 255)),
}


@pytest.mark.parametrize("name", DEEP)
def test_value_range_maps_images_with_more_than_8_bits(name):
    data, expected = DEEP[name]
    validated = validate_image(data)
    pixels = decode(validated.encoded, RANGE).numpy().astype(int)
    if expected is None:
        # Half-way values are rounded to even on both sides.
        assert np.abs(255 - GRAY_EXPECTED.astype(int) - pixels).max() <= 1
        assert pixels[0, 0, 0] == 255
    else:
        assert np.array_equal(pixels, expected)
    assert validated.values is not None
    if "PNG" in name:
        assert np.array_equal(decode(data, RANGE).numpy(), expected)
        assert validated.encoded == data
    reencoded = validate_image(data, keep_encoding=False)
    assert np.array_equal(decode(reencoded.encoded, RANGE).numpy(), pixels)
    assert reencoded.sha256 == validated.sha256


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_negative_values_are_kept(dtype):
    values = np.array([[-1024, -1, 0, 1, 3071]], dtype)
    stored = validate_image(encode(Image.fromarray(values), "TIFF")).encoded
    assert decode(stored, (-1024.0, 3071.0)).numpy()[0, :, 0].tolist() == [0, 64, 64, 64, 255]
    assert decode(stored, (0.0, 1.0)).numpy()[0, :, 0].tolist() == [0, 0, 0, 255, 255]


def test_images_with_8_bits_ignore_the_value_range():
    assert np.array_equal(decode(tf.constant(encode(RGB, "PNG")), (0.0, 10.0)).numpy(), COLORS)
