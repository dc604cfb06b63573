"""Images that mean harm; the many odd and bad files of the wild, 30 kinds, stand in unit/test_data_proving.py."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from topwork.data import decode_pool, image_validation
from topwork.data.decode_pool import Provers
from topwork.data.image_validation import Proved, Rejection, prove
from topwork.errors import DataError


def saved(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(file, kind, **options)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


PIXELS = (b"IDAT", zlib.compress(b"\0" * 25 * 8))
END = (b"IEND", b"")
GIF = saved("GIF")
TIFF = saved("TIFF")
BAD = {
    "PNG of 4 gigapixels": (png(header(65535, 65535), PIXELS, END), "too large"),
    "PNG of no width": (png(header(0, 8), PIXELS, END), "unknown format"),
    "PNG with a text that is a bomb": (
        png(header(8, 8), (b"zTXt", b"x\0\0" + zlib.compress(bytes(80 * 2**20))), PIXELS, END),
        "undecodable",
    ),
    "PNG with a profile that is a bomb": (
        png(header(8, 8), (b"iCCP", b"x\0\0" + zlib.compress(bytes(80 * 2**20))), PIXELS, END),
        None,
    ),
    "GIF of a huge screen": (GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:], "too large"),
    "BMP of a huge size": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 10**9, 10**9, 1, 24, *[0] * 6),
        "too large",
    ),
    "TIFF whose directory is itself": (TIFF[:4] + struct.pack("<I", 4) + TIFF[8:], None),
    "JPEG that is a web page": (b"<html><script>alert(1)</script>", "unknown format"),
    "PostScript, which runs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "unknown format"),
    "PNG and a zip behind it": (saved("PNG") + b"PK\3\4" + bytes(100), "proved"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_rejected_with_a_reason_and_little_memory(name):
    data, reason = BAD[name]
    try:
        prove(data)
        found = "proved"
    except Rejection as rejection:
        found = rejection.reason
        assert found in image_validation.REASONS
    assert reason in (found, None)


def _hang_on_request(data: bytes, *, keep: bool) -> Proved:
    if data == b"hang":
        time.sleep(600)
    if data == b"greedy":
        bytearray(8 * 2**30)
    return prove(data, keep=keep)


def test_an_image_that_never_lets_go_of_its_decoder_is_rejected_and_the_others_are_proved(monkeypatch):
    monkeypatch.setattr(decode_pool, "IMAGE_SECONDS", 6.0)
    good = saved("PNG")
    with Provers(_hang_on_request, workers=1) as pool:
        outcomes = [outcome for _, outcome in pool.each([good, b"hang", good], lambda data: data)]
    assert [getattr(outcome, "reason", "proved") for outcome in outcomes] == ["proved", "decoder hung", "proved"]


def test_many_images_that_hang_end_the_pull(monkeypatch):
    monkeypatch.setattr(decode_pool, "IMAGE_SECONDS", 1.0)
    monkeypatch.setattr(decode_pool, "MAX_HUNG", 0)
    with Provers(_hang_on_request, workers=1) as pool, pytest.raises(DataError, match="made to keep a computer busy"):
        pool.prove(b"hang")


def test_a_decoder_that_takes_more_memory_than_any_image_needs_gets_none():
    with Provers(_hang_on_request, workers=1) as pool:
        with pytest.raises(MemoryError):
            pool.prove(b"greedy")
        assert pool.prove(saved("PNG")).encoded == saved("PNG")


def test_an_image_without_memory_is_rejected(monkeypatch):
    def fails(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_validation, "_eight_bit", fails)
    with pytest.raises(Rejection) as rejected:
        prove(saved("BMP"))
    assert rejected.value.reason == "too large"
