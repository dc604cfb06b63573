"""What becomes of the images that are found in the wild."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from topwork.data import image_validation
from topwork.data.decode_pool import Provers
from topwork.data.image_validation import Proved, Rejection, prove

RED, BLUE = (250, 10, 10), (10, 10, 250)


def _file(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _halves(mode="RGB", size=(40, 24)):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def _pixels(proved):
    with Image.open(io.BytesIO(proved.encoded)) as image:
        return image.format, image.mode, np.asarray(image)


def _decoded_by_tensorflow(proved):
    from topwork.data.decoding import decode

    return decode(proved.encoded).numpy()


@pytest.mark.parametrize(
    "data",
    [
        _file(_halves(), "JPEG", quality=95),
        _file(_halves(), "JPEG", quality=95, progressive=True),
        _file(_halves("L"), "JPEG"),
        _file(_halves(), "MPO", save_all=True, append_images=[_halves()]),
        _file(_halves(), "PNG"),
        _file(_halves("L"), "PNG"),
    ],
    ids=["baseline", "progressive", "grey", "two views", "png", "grey png"],
)
def test_a_plain_upright_image_keeps_its_bytes(data):
    proved = prove(data)
    assert proved.encoded == data
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    # Decoders of JPEG differ a little where colours meet.
    assert np.abs(_decoded_by_tensorflow(proved).astype(int) - expected).mean() < 2


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (_file(_halves("CMYK"), "JPEG", quality=95), 12),
        (_file(_halves("P"), "PNG"), 0),
        (_file(_halves("P"), "GIF"), 0),
        (_file(_halves(), "BMP"), 0),
        (_file(_halves(), "TIFF"), 0),
        (_file(_halves(), "WEBP", lossless=True), 0),
        (_file(_halves("RGBA"), "PNG"), 0),
        (_file(_halves("P"), "GIF", save_all=True, append_images=[Image.new("P", (40, 24))]), 0),
        (_file(_halves("CMYK"), "TIFF"), 0),
    ],
    ids=["CMYK JPEG", "palette PNG", "GIF", "BMP", "TIFF", "WebP", "opaque alpha", "animated GIF", "CMYK TIFF"],
)
def test_other_images_become_rgb_png(data, tolerance):
    kind, mode, pixels = _pixels(prove(data))
    assert (kind, mode, pixels.shape) == ("PNG", "RGB", (24, 40, 3))
    assert np.abs(pixels[12, 5].astype(int) - RED).max() <= tolerance
    assert np.abs(pixels[12, 35].astype(int) - BLUE).max() <= tolerance
    assert (_decoded_by_tensorflow(prove(data)) == pixels).all()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = _halves()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    data = _file(upright.transpose(undo[orientation]), "PNG", exif=exif)
    kind, _, pixels = _pixels(prove(data))
    assert kind == "PNG"
    assert (pixels == np.asarray(upright)).all()


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 10, 20))
    _, mode, pixels = _pixels(prove(_file(image, "PNG")))
    assert (mode, pixels[5, 5].tolist(), pixels[5, 15].tolist()) == ("RGB", list(RED), [255, 255, 255])


def test_a_transparent_palette_colour_is_laid_on_white():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 10, 20))
    _, mode, pixels = _pixels(prove(_file(image, "PNG", transparency=0)))
    assert (mode, pixels[5, 5].tolist(), pixels[5, 15].tolist()) == ("RGB", list(RED), [255, 255, 255])


def test_sixteen_bits_become_eight():
    values = np.array([[0, 255, 256, 32768, 65535]] * 5, np.uint16)
    kind, mode, pixels = _pixels(prove(_file(Image.fromarray(values), "PNG")))
    assert (kind, mode, pixels[0].tolist()) == ("PNG", "L", [0, 0, 1, 128, 255])


def test_one_bit_becomes_grey():
    kind, mode, pixels = _pixels(prove(_file(Image.fromarray(np.eye(9, dtype=bool)), "PNG")))
    assert (kind, mode) == ("PNG", "L")
    assert (pixels == np.eye(9) * 255).all()


def _bomb(width, height):
    """A PNG file of a few bytes that says it is huge."""
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
        (_file(_halves(size=(400, 400)), "JPEG")[:900], "truncated"),
        (_file(Image.effect_noise((200, 200), 90), "PNG")[:20000], "truncated"),
        (_file(_halves(), "PNG")[:41] + b"broken" + _file(_halves(), "PNG")[47:], "undecodable"),
        (_bomb(100_000, 100_000), "too large"),
        (_bomb(8001, 8000), "too large"),
        (_file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unknown format"),
    ],
    ids=["empty", "text", "svg", "cut JPEG", "cut PNG", "broken PNG", "bomb", "8001x8000", "float TIFF"],
)
def test_what_does_not_decode_is_rejected_with_its_reason(data, reason):
    with pytest.raises(Rejection) as rejected:
        prove(data)
    assert rejected.value.reason == reason
    assert reason in image_validation.REASONS


def test_a_file_above_the_limit_of_bytes_is_rejected_unread(monkeypatch):
    monkeypatch.setattr(image_validation, "MAX_BYTES", 100)
    with pytest.raises(Rejection) as rejected:
        prove(bytes(101))
    assert (rejected.value.reason, rejected.value.detail) == ("too large", "101 bytes, at most 100")


def test_equal_pictures_have_equal_digests_however_they_are_encoded():
    assert prove(_file(_halves(), "PNG")).sha256 == prove(_file(_halves(), "BMP")).sha256
    assert prove(_file(_halves(), "PNG")).sha256 != prove(_file(_halves(size=(24, 40)), "PNG")).sha256


def _die_on_request(data: bytes, *, keep: bool) -> Proved:
    if data == b"die":
        os.abort()
    return prove(data, keep=keep)


def test_an_image_that_kills_its_decoder_is_rejected_and_the_others_are_proved():
    good = _file(_halves(), "PNG")
    with Provers(_die_on_request, workers=2) as provers:
        outcomes = [outcome for _, outcome in provers.each([good, b"die", good, b"", good], lambda data: data)]
    assert [getattr(outcome, "reason", "proved") for outcome in outcomes] == [
        "proved",
        "decoder crashed",
        "proved",
        "empty",
        "proved",
    ]


def test_what_pillow_mends_and_tensorflow_does_not_is_encoded_anew():
    from topwork.data.decoding import is_readable

    whole = _file(_halves(), "PNG")
    damaged = whole[:-1] + b"\0"  # the checksum of its last chunk
    assert prove(damaged).encoded == damaged
    with Provers(readable=is_readable, workers=1) as provers:
        assert provers.prove(whole).encoded == whole
        assert (_decoded_by_tensorflow(provers.prove(damaged)) == np.asarray(_halves())).all()
