"""Proves that an image decodes, and brings it into the one stored form: upright, 8 bit, RGB or grey, JPEG or PNG.

Runs in worker processes: nothing here imports TensorFlow, so that a worker starts in a moment and stays small.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from topwork.redaction import without_secrets

MAX_BYTES = 64 * 2**20
"""Bytes of an encoded image at most."""

MAX_PIXELS = 64_000_000
"""Pixels of an image at most, read from its header before anything is decoded: 192 MB as RGB."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""What is decoded, in Pillow's names, whatever the suffix says."""

EMPTY = "empty"
TOO_LARGE = "too large"
UNKNOWN_FORMAT = "unknown format"
TRUNCATED = "truncated"
UNDECODABLE = "undecodable"
CRASHED = "decoder crashed"
HUNG = "decoder hung"
MISSING = "missing"
NO_LABEL = "no label"
UNSAFE = "unsafe member"
REASONS = (EMPTY, TOO_LARGE, UNKNOWN_FORMAT, TRUNCATED, UNDECODABLE, CRASHED, HUNG, MISSING, NO_LABEL, UNSAFE)
"""Why an image is left out: all values of the label `reason` of topwork_images_rejected_total."""

# The coefficients of baseline, extended and progressive JPEG with Huffman codes: what TensorFlow decodes too.
_PLAIN_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_UPRIGHT = 1
_ORIENTATION = 0x0112
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class Rejection(Exception):  # noqa: N818 - no error of the program
    """An image is left out.

    Attributes:
        reason: One of `REASONS`.
        detail: What the decoder or the source said.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        # What a decoder or server said may hold what nobody may read, and is stored.
        detail = without_secrets(detail)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Proved:
    """An image that decodes.

    Attributes:
        encoded: JPEG or PNG file, upright, 8 bit, RGB or grey.
        sha256: Digest, in hex, of its size and RGB pixels: equal for equal pictures, however they are encoded.
    """

    encoded: bytes
    sha256: str


def prove(data: bytes, *, keep: bool = True) -> Proved:
    """Decode an image file whole.

    A plain upright JPEG or PNG keeps its bytes. Everything else is encoded anew as PNG, without loss: EXIF orientation
    applied, transparency laid on white, CMYK, palette, 16 bit and one bit turned to 8-bit RGB or grey, the first frame
    of an animation.

    Args:
        data: The file.
        keep: Whether a plain image may keep its bytes.

    Returns:
        What is stored.

    Raises:
        Rejection: If the file is empty, too large, of no known format, truncated or does not decode.
    """
    if not data:
        raise Rejection(EMPTY)
    if len(data) > MAX_BYTES:
        raise Rejection(TOO_LARGE, f"{len(data)} bytes, at most {MAX_BYTES}")
    Image.init()
    # The limit of pixels is ours; and what libjpeg mends without a word is no reason to warn about.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(data, keep=keep)


def _decode(data: bytes, *, keep: bool) -> Proved:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejection(TOO_LARGE, f"{image.width}x{image.height} pixels, at most {MAX_PIXELS}")
            image.load()
            orientation = _orientation(image)
            keep = keep and orientation == _UPRIGHT and _is_plain(image, data)
            pixels = _upright(_eight_bit(image), orientation)
    except Rejection:
        raise
    except UnidentifiedImageError as error:
        raise Rejection(UNKNOWN_FORMAT, f"begins with {data[:8]!r}") from error
    except MemoryError as error:
        # Provers bound the memory of their workers: other images need it, too.
        raise Rejection(TOO_LARGE, "it takes more memory to decode than any image of its size") from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Rejection(TRUNCATED if truncated else UNDECODABLE, f"{type(error).__name__}: {error}"[:200]) from error
    return Proved(data if keep else _png(pixels), _digest(pixels))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # broken EXIF says nothing about the picture
        return _UPRIGHT
    return value if value in range(1, 9) else _UPRIGHT


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == _UPRIGHT:
        return image
    image.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)


def _is_plain(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return False
    if image.format in ("JPEG", "MPO"):  # MPO is the JPEG of cameras that store several views
        return next(_jpeg_frames(data), None) in _PLAIN_JPEG_FRAMES
    # Byte 24 of a PNG is the bit depth: Pillow shows 1, 2, 4 and 16 bits as 8.
    return image.format == "PNG" and data[24] == 8 and not getattr(image, "is_animated", False)


def _jpeg_frames(data: bytes) -> Iterator[int]:
    """Yield the start-of-frame markers of a JPEG file (ITU T.81, table B.1)."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            position += 1  # fill bytes or garbage between segments, which decoders skip too
            continue
        marker = data[position + 1]
        if marker in _JPEG_FRAMES:
            yield marker
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD9:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        low, high = cast("tuple[float, float]", image.getextrema())
        if low < 0 or high > 65535:
            raise Rejection(UNKNOWN_FORMAT, f"32-bit pixels from {low:g} to {high:g}; at most 16 bits are known")
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "F":
        raise Rejection(UNKNOWN_FORMAT, "floating-point pixels have no known range")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _png(image: Image.Image) -> bytes:
    plain = Image.frombytes(image.mode, image.size, image.tobytes())  # pixels alone: no profile, no EXIF
    file = io.BytesIO()
    plain.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _digest(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
