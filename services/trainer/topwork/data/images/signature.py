"""Signature of an image: a small gray thumbnail, its size and its sharpness, for the audit of a dataset.

Runs in worker processes and does not import NumPy, for the reason in `topwork.data.images.decode_pool`.
"""

import struct
from dataclasses import dataclass
from typing import cast

from PIL import Image, ImageFilter, ImageMath, ImageStat

THUMBNAIL_PIXELS = 32
"""Width and height of a thumbnail. The aspect ratio is not preserved."""

RECORD = struct.Struct(f"<QIIf{THUMBNAIL_PIXELS**2}s")
"""A signature in a file: pixel digest (first 8 bytes), width, height, sharpness, thumbnail."""

# Sharpness depends on the size of an image, so all larger images are reduced to a longer side of half to all of this.
_SHARPNESS_PIXELS = 192
# Discrete Laplace operator, shifted to 128: values of a uint8 image are never negative.
_LAPLACE = ImageFilter.Kernel((3, 3), (0, 1, 0, 1, -4, 1, 0, 1, 0), scale=1, offset=128)


@dataclass(frozen=True)
class Signature:
    """Signature of an image.

    Attributes:
        width: Width in pixels.
        height: Height in pixels.
        sharpness: Variance of the Laplace operator on the image, reduced to at most 192 pixels.
        thumbnail: Gray values of the thumbnail, row by row.
    """

    width: int
    height: int
    sharpness: float
    thumbnail: bytes

    def pack(self, digest: str) -> bytes:
        """Return the record of the image in a file.

        Args:
            digest: Hex digest of the pixels.
        """
        return RECORD.pack(int(digest[:16], 16), self.width, self.height, self.sharpness, self.thumbnail)


def sign_image(image: Image.Image) -> Signature:
    """Compute the signature of an image with 8 bits per channel.

    Args:
        image: An upright RGB or grayscale image.

    Returns:
        The signature.
    """
    return _sign(_reduce(image).convert("L"), image.size)


def sign_high_bit_depth(planes: tuple[Image.Image, ...], *, is_inverted: bool) -> Signature:
    """Compute the signature of an image with more than 8 bits per channel; its own lowest value is black.

    Args:
        planes: Upper and lower bytes of 16-bit values, or one image of mode I or F.
        is_inverted: Whether the lowest value is white.

    Returns:
        The signature.
    """
    parts = [_reduce(plane if plane.mode in ("I", "F") else plane.convert("L")).convert("F") for plane in planes]
    gray = parts[0]
    if len(parts) == 2:
        gray = ImageMath.lambda_eval(lambda part: part["upper"] * 256 + part["lower"], upper=parts[0], lower=parts[1])
    low, high = cast("tuple[float, float]", gray.getextrema())
    scale = 255 / (high - low) if high > low else 0.0
    slope, offset = (-scale, 255 + low * scale) if is_inverted else (scale, -low * scale)
    return _sign(gray.point(lambda value: value * slope + offset).convert("L"), planes[0].size)


def _reduce(image: Image.Image) -> Image.Image:
    factor = -(-max(image.size) // _SHARPNESS_PIXELS)
    return image.reduce(factor) if factor > 1 and min(image.size) >= factor else image


def _sign(gray: Image.Image, size: tuple[int, int]) -> Signature:
    thumbnail = gray.resize((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.BOX)
    # The filter copies the outermost pixels.
    edges = gray.filter(_LAPLACE).crop((1, 1, max(2, gray.width - 1), max(2, gray.height - 1)))
    return Signature(size[0], size[1], float(ImageStat.Stat(edges).var[0]), thumbnail.tobytes())
