"""Image validation: decodes an image and normalizes it to an upright 8-bit RGB or grayscale JPEG or PNG file.

Runs in worker processes. This module does not import TensorFlow, so that workers start quickly and stay small.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from PIL import Image, ImageOps, UnidentifiedImageError

from topwork.redaction import redact

MAX_BYTES = 64 * 2**20
"""Maximum size of an encoded image, in bytes."""

MAX_PIXELS = 64_000_000
"""Maximum number of pixels of an image: 192 MB as RGB. Checked against the header, before decoding."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""Accepted formats, as Pillow names them. The format is detected from the content, not from the file name."""

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
"""Why an image is rejected: all values of the label `reason` of topwork_images_rejected_total."""

# Start-of-frame markers of baseline, extended and progressive Huffman-coded JPEG, which TensorFlow decodes too.
_DECODABLE_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_UPRIGHT = 1
_ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class Rejection(Exception):  # noqa: N818 - a result, not a program error
    """An image is rejected.

    Attributes:
        reason: One of `REASONS`.
        detail: Error message of the decoder or the source.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        # The message of a decoder or server is stored, and it may contain credentials.
        detail = redact(detail)
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ValidatedImage:
    """An image that decodes, in the form in which it is stored.

    Attributes:
        encoded: Bytes of an upright 8-bit RGB or grayscale JPEG or PNG file.
        sha256: Hex digest of the size and the RGB pixels, independent of the encoding.
    """

    encoded: bytes
    sha256: str


def validate_image(data: bytes, *, keep_encoding: bool = True) -> ValidatedImage:
    """Decode an image file completely and normalize it.

    An upright 8-bit RGB or grayscale JPEG or PNG file is returned unchanged. Any other image is re-encoded losslessly
    as PNG: the EXIF orientation is applied, transparency is composited on white, and CMYK, palette, 16-bit and 1-bit
    pixels are converted to 8-bit RGB or grayscale. Only the first frame of an animation is used.

    Args:
        data: Bytes of the file.
        keep_encoding: Whether a file that needs no conversion is returned unchanged. If False, it is re-encoded too.

    Returns:
        The normalized image.

    Raises:
        Rejection: If the file is empty, too large, truncated, of an unknown format, or can't be decoded.

    Example:
        >>> image = validate_image(Path("scan.tiff").read_bytes())
        >>> Path("scan.png").write_bytes(image.encoded)
    """
    if not data:
        raise Rejection(EMPTY)
    if len(data) > MAX_BYTES:
        raise Rejection(TOO_LARGE, f"{len(data)} bytes, at most {MAX_BYTES}")
    Image.init()
    # `_decode` has its own pixel limit. Damage that libjpeg repairs silently is not worth a warning.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(data, keep_encoding=keep_encoding)


def _decode(data: bytes, *, keep_encoding: bool) -> ValidatedImage:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejection(TOO_LARGE, f"{image.width}x{image.height} pixels, at most {MAX_PIXELS}")
            image.load()
            orientation = _read_orientation(image)
            keep_encoding = keep_encoding and orientation == _UPRIGHT and _is_normalized(image, data)
            pixels = _apply_orientation(_convert_to_8_bit(image), orientation)
    except Rejection:
        raise
    except UnidentifiedImageError as error:
        raise Rejection(UNKNOWN_FORMAT, f"begins with {data[:8]!r}") from error
    except MemoryError as error:
        # DecodePool limits the memory of its workers.
        raise Rejection(TOO_LARGE, "decoding it takes more memory than an image of this size needs") from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Rejection(TRUNCATED if truncated else UNDECODABLE, f"{type(error).__name__}: {error}"[:200]) from error
    return ValidatedImage(data if keep_encoding else _encode_png(pixels), _pixel_digest(pixels))


def _read_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, _UPRIGHT)
    except Exception:  # the image may be fine even if its EXIF data is damaged
        return _UPRIGHT
    return value if value in range(1, 9) else _UPRIGHT


def _apply_orientation(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == _UPRIGHT:
        return image
    image.getexif()[_ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)


def _is_normalized(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return False
    if image.format in ("JPEG", "MPO"):  # MPO is a JPEG file with several views, written by some cameras
        return next(_jpeg_frames(data), None) in _DECODABLE_JPEG_FRAMES
    # Byte 24 of a PNG is the bit depth: Pillow reports 1, 2, 4 and 16 bits as 8.
    return image.format == "PNG" and data[24] == 8 and not getattr(image, "is_animated", False)


def _jpeg_frames(data: bytes) -> Iterator[int]:
    """Yield the start-of-frame markers of a JPEG file (ITU T.81, table B.1)."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:
            position += 1  # fill bytes or garbage between segments: decoders skip them too
            continue
        marker = data[position + 1]
        if marker in _JPEG_FRAMES:
            yield marker
        if marker in (0xFF, 0x00, 0x01) or 0xD0 <= marker <= 0xD9:
            position += 1 if marker == 0xFF else 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


def _convert_to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        low, high = cast("tuple[float, float]", image.getextrema())
        if low < 0 or high > 65535:
            raise Rejection(UNKNOWN_FORMAT, f"32-bit pixels from {low:g} to {high:g}; at most 16 bits are supported")
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode == "F":
        raise Rejection(UNKNOWN_FORMAT, "floating-point pixels are not supported: their value range is unknown")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _encode_png(image: Image.Image) -> bytes:
    bare = Image.frombytes(image.mode, image.size, image.tobytes())  # drops the color profile and EXIF
    file = io.BytesIO()
    bare.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _pixel_digest(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()
