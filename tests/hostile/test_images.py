"""Malicious images. For damaged and unusual images, see unit/test_image_validation.py."""

import io
import os
import signal
import struct
import time
import zlib

import pytest
from PIL import Image

from topwork.data.images import decode_pool, image_validation
from topwork.data.images.decode_pool import DecodePool
from topwork.data.images.image_validation import Rejection, ValidatedImage, validate_image
from topwork.errors import DataError, UnavailableError


def encode(kind: str, **options) -> bytes:
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
GIF = encode("GIF")
TIFF = encode("TIFF")
MALICIOUS = {
    "PNG with 4 gigapixels": (png(header(65535, 65535), PIXELS, END), "too large"),
    "PNG with width 0": (png(header(0, 8), PIXELS, END), "unknown format"),
    "PNG with a decompression bomb as text": (
        png(header(8, 8), (b"zTXt", b"x\0\0" + zlib.compress(bytes(80 * 2**20))), PIXELS, END),
        "valid",
    ),
    "PNG with a decompression bomb as color profile": (
        png(header(8, 8), (b"iCCP", b"x\0\0" + zlib.compress(bytes(80 * 2**20))), PIXELS, END),
        "valid",
    ),
    "GIF with a huge screen size": (GIF[:6] + b"\xff\xff\xff\xff" + GIF[10:], "too large"),
    "BMP with a huge size": (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 10**9, 10**9, 1, 24, *[0] * 6),
        "too large",
    ),
    "TIFF with a self-referencing directory": (TIFF[:4] + struct.pack("<I", 4) + TIFF[8:], None),
    "HTML page": (b"<html><script>alert(1)</script>", "unknown format"),
    "PostScript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "unknown format"),
    "PNG with an appended zip file": (encode("PNG") + b"PK\3\4" + bytes(100), "valid"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALICIOUS)
def test_validate_image_rejects_a_malicious_image_with_a_reason(name):
    data, reason = MALICIOUS[name]
    try:
        validate_image(data)
        outcome = "valid"
    except Rejection as rejection:
        outcome = rejection.reason
        assert outcome in image_validation.REASONS
    assert reason in (outcome, None)


def _hang_on_request(data: bytes, *, keep_encoding: bool) -> ValidatedImage:
    while data == b"hang":
        pass
    if data == b"starved":
        time.sleep(600)
    if data == b"killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if data == b"greedy":
        bytearray(8 * 2**30)
    return validate_image(data, keep_encoding=keep_encoding)


def test_decode_pool_rejects_an_image_that_hangs_its_worker_and_validates_the_others(monkeypatch):
    monkeypatch.setattr(decode_pool, "IMAGE_TIMEOUT_SECONDS", 6.0)
    monkeypatch.setattr(decode_pool, "IMAGE_CPU_SECONDS", 2)
    valid = encode("PNG")
    with DecodePool(_hang_on_request, workers=1) as pool:
        results = [result for _, result in pool.validate_all([valid, b"hang", valid], lambda data: data)]
    assert [getattr(result, "reason", "valid") for result in results] == ["valid", "decoder hung", "valid"]


@pytest.mark.parametrize(
    ("image", "timeout_seconds", "reason"),
    [(b"starved", 2.0, "This machine is overloaded"), (b"killed", 60.0, "ran out of memory")],
)
def test_decode_pool_rejects_no_image_that_another_machine_may_decode(monkeypatch, image, timeout_seconds, reason):
    monkeypatch.setattr(decode_pool, "IMAGE_TIMEOUT_SECONDS", timeout_seconds)
    monkeypatch.setattr(decode_pool, "ISOLATED_TIMEOUT_SECONDS", timeout_seconds)
    with (
        DecodePool(_hang_on_request, workers=1) as pool,
        pytest.raises(UnavailableError, match=f"^b'{image.decode()}': .*{reason}") as caught,
    ):
        list(pool.validate_all([image], lambda data: data))
    assert caught.value.exit_code == 75


def test_decode_pool_fails_when_too_many_images_hang(monkeypatch):
    monkeypatch.setattr(decode_pool, "IMAGE_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(decode_pool, "IMAGE_CPU_SECONDS", 1)
    monkeypatch.setattr(decode_pool, "MAX_TIMEOUTS", 0)
    with (
        DecodePool(_hang_on_request, workers=1) as pool,
        pytest.raises(DataError, match="these files may be malicious"),
    ):
        pool.validate(b"hang")


def test_decode_pool_limits_the_memory_of_its_workers():
    with DecodePool(_hang_on_request, workers=1) as pool:
        with pytest.raises(MemoryError):
            pool.validate(b"greedy")
        assert pool.validate(encode("PNG")).encoded == encode("PNG")


def test_validate_image_rejects_an_image_that_runs_out_of_memory(monkeypatch):
    def raise_memory_error(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(image_validation, "_convert_to_8_bit", raise_memory_error)
    with pytest.raises(Rejection) as rejected:
        validate_image(encode("BMP"))
    assert rejected.value.reason == "too large"
