"""Image validation: decodes an image and normalizes it to an upright RGB or grayscale JPEG or PNG file.

Runs in worker processes. This module does not import TensorFlow, so that workers start quickly and stay small.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageFile, UnidentifiedImageError

from topwork.data.images.high_bit_depth import (
    MARKER_CHUNK,
    TRANSPOSITIONS,
    HighBitDepthImage,
    PixelValues,
    read_high_bit_depth,
)
from topwork.data.images.image_metadata import MAX_STORED_METADATA_BYTES, find_png_chunk, remove_metadata
from topwork.data.images.rejection import (
    CRASHED,
    EMPTY,
    HUNG,
    MAX_BYTES,
    MISSING,
    NO_LABEL,
    REASONS,
    TOO_LARGE,
    TRUNCATED,
    UNDECODABLE,
    UNKNOWN_FORMAT,
    UNSAFE,
    Rejection,
)
from topwork.data.images.signature import Signature, sign_high_bit_depth, sign_image

__all__ = [
    "CRASHED",
    "EMPTY",
    "HUNG",
    "MAX_BYTES",
    "MISSING",
    "NO_LABEL",
    "REASONS",
    "TOO_LARGE",
    "TRUNCATED",
    "UNDECODABLE",
    "UNKNOWN_FORMAT",
    "UNSAFE",
    "Rejection",
    "ValidatedImage",
    "validate_image",
]

MAX_PIXELS = 64_000_000
"""Maximum number of pixels of an image: 192 MB as RGB. Checked against the header, before decoding."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""Accepted formats, as Pillow names them. The format is detected from the content, not from the file name."""

SEVERAL_FRAMES = ", several frames"
"""End of the kind of a file that contains more pages or frames than the first one, which is used."""

# Start-of-frame markers of baseline, extended and progressive Huffman-coded JPEG, which TensorFlow decodes too.
_DECODABLE_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
_JPEG_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
_UPRIGHT = 1
_ORIENTATION = 0x0112  # EXIF and TIFF tag
# How the files of other formats begin: such a file has a damaged header, or a pixel layout that Pillow does not know.
_SIGNATURES = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WebP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "BigTIFF",
    b"MM\0+": "BigTIFF",
}


@dataclass(frozen=True)
class ValidatedImage:
    """An image that decodes, in the form in which it is stored.

    Attributes:
        encoded: Bytes of an upright RGB or grayscale JPEG or PNG file with 8 bits per channel, or of a PNG file as
            described in `topwork.data.images.high_bit_depth`.
        sha256: Hex digest of the size and the pixels, independent of the encoding.
        kind: Format and pixels of the original file, such as `PNG RGBA` or `JPEG RGB, EXIF orientation`.
        values: Pixel values; None for an image with 8 bits per channel.
        signature: Thumbnail, size and sharpness.
        original: The original file, if `encoded` is another one. Set by `topwork.data.images.decode_pool`.
    """

    encoded: bytes
    sha256: str
    kind: str = ""
    values: PixelValues | None = None
    signature: Signature | None = None
    original: bytes | None = None


def validate_image(data: bytes, *, keep_encoding: bool = True) -> ValidatedImage:
    """Decode an image file completely and normalize it.

    An upright 8-bit RGB or grayscale JPEG or PNG file, or a 16-bit PNG file, is returned unchanged. Any other image is
    re-encoded losslessly as PNG: the EXIF orientation is applied, transparency is composited on white, and CMYK,
    palette and 1-bit pixels are converted to 8-bit RGB or grayscale. Pixels with more than 8 bits per channel keep
    their values. Metadata is ignored, even if it is damaged. Only the first page or frame is used.

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
    # `_normalize` has its own pixel limit. Damage that libjpeg repairs silently is not worth a warning.
    Image.MAX_IMAGE_PIXELS = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _decode(data, keep_encoding=keep_encoding)


def _decode(data: bytes, *, keep_encoding: bool) -> ValidatedImage:
    try:
        return _normalize(data, keep_encoding=keep_encoding)
    except Rejection:
        raise
    except UnidentifiedImageError as error:
        raise Rejection(UNKNOWN_FORMAT, _describe_start(data)) from error
    except MemoryError as error:
        # DecodePool limits the memory of its workers.
        raise Rejection(TOO_LARGE, "decoding it takes more memory than an image of this size needs") from error
    except Exception as error:  # Pillow's decoders raise OSError, ValueError, SyntaxError, struct.error and more
        truncated = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Rejection(TRUNCATED if truncated else UNDECODABLE, f"{type(error).__name__}: {error}"[:200]) from error


def _normalize(data: bytes, *, keep_encoding: bool) -> ValidatedImage:
    bare = remove_metadata(data)
    # Long metadata would be read in every epoch. A file with the private chunk is not what it seems.
    is_storable = len(data) - len(bare) <= MAX_STORED_METADATA_BYTES and find_png_chunk(data, MARKER_CHUNK) is None
    with Image.open(io.BytesIO(bare), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise Rejection(TOO_LARGE, f"{image.width}x{image.height} pixels, at most {MAX_PIXELS}")
        orientation = _read_orientation(image)
        # Pillow turns TIFF images upright when it loads them.
        turn = _UPRIGHT if image.format == "TIFF" else orientation
        keep_encoding = keep_encoding and is_storable and turn == _UPRIGHT
        kind = f"{image.format} {{}}{', EXIF orientation' if orientation != _UPRIGHT else ''}"
        deep = read_high_bit_depth(image, bare)
        if deep:
            validated = _validate_high_bit_depth(deep, data, image, turn, keep_encoding=keep_encoding)
            kind = kind.format(deep.mode)
        else:
            image.load()
            kind = kind.format(f"{image.mode}{', transparency' if image.has_transparency_data else ''}")
            keep_encoding = keep_encoding and _is_normalized(image, data)
            pixels = _convert_to_8_bit(image)
            pixels = pixels.transpose(TRANSPOSITIONS[turn]) if turn in TRANSPOSITIONS else pixels
            encoded = data if keep_encoding else _encode_png(pixels)
            validated = ValidatedImage(encoded, _pixel_digest(pixels), signature=sign_image(pixels))
        return replace(validated, kind=kind + SEVERAL_FRAMES if _has_more_frames(image) else kind)


def _validate_high_bit_depth(
    deep: HighBitDepthImage, data: bytes, image: ImageFile.ImageFile, turn: int, *, keep_encoding: bool
) -> ValidatedImage:
    deep = deep.turn_upright(turn)
    keep_encoding = keep_encoding and image.format == "PNG"
    digest = hashlib.sha256(deep.content()).hexdigest()
    encoded = data if keep_encoding else deep.encode()
    signature = sign_high_bit_depth(deep.planes, is_inverted=deep.is_inverted)
    return ValidatedImage(encoded, digest, values=deep.measure(), signature=signature)


def _describe_start(data: bytes) -> str:
    start = f"begins with {data[:8]!r}"
    found = next((name for signature, name in _SIGNATURES.items() if data.startswith(signature)), None)
    if found is None:
        return start
    return f"{start} like a {found} file, but its header is damaged or its pixel layout is not supported"


def _read_orientation(image: ImageFile.ImageFile) -> int:
    """Read the orientation as `topwork.data.images.decoding` does: from EXIF data, or from the TIFF tag."""
    try:
        if image.format == "TIFF":
            value = getattr(image, "tag_v2", {}).get(_ORIENTATION, _UPRIGHT)
        else:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            value = exif.get(_ORIENTATION, _UPRIGHT)
    except Exception:  # the image may be fine even if its EXIF data is damaged
        return _UPRIGHT
    return value if value in range(1, 9) else _UPRIGHT


def _has_more_frames(image: ImageFile.ImageFile) -> bool:
    try:
        image.seek(image.tell() + 1)
    except Exception:  # no other frame, or a damaged one
        return False
    return True


def _is_normalized(image: Image.Image, data: bytes) -> bool:
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return False
    if image.format in ("JPEG", "MPO"):  # MPO is a JPEG file with several views, written by some cameras
        return next(_jpeg_frames(data), None) in _DECODABLE_JPEG_FRAMES
    # Byte 24 of a PNG is the bit depth: Pillow reports 2 and 4 bits as 8.
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
