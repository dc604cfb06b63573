"""Images with more than 8 bits per channel: reads, measures and stores their pixel values without loss.

Pillow keeps only the upper 8 bits of most of them, so the upper and the lower byte of each value are read separately.
Runs in worker processes and does not import NumPy, for the reason in `topwork.data.images.decode_pool`.

Stored as PNG: values from 0 to 65535 as 16-bit grayscale or RGB, with or without alpha. Other values (32-bit integers,
floating point, negative numbers) are stored as an RGBA image whose four bytes are the little-endian value. A private
chunk `twPx` after the header marks these, and images in which the lowest value is white.
`topwork.data.images.decoding` reads this form.
"""

import array
import io
import math
import struct
import sys
import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

from PIL import Image, ImageFile

from topwork.data.images.image_metadata import PNG_SIGNATURE, find_png_chunk
from topwork.data.images.rejection import UNKNOWN_FORMAT, Rejection

MARKER_CHUNK = b"twPx"
"""PNG chunk after the header: the kind of the values (u, i or f), then 1 if the lowest value is white, otherwise 0."""

IMAGE_OUTLIERS = 1e-4
"""Share of the pixels of an image that may lie outside its measured range, such as hot pixels of a sensor."""
_BULK = 0.99
_MAX_HISTOGRAMS = 40  # enough for an outlier near the largest float32: each histogram narrows an interval by 255

_HEADER_END = 33  # of a PNG file
_COLOR_TYPES = {"L": 0, "RGB": 2, "LA": 4, "RGBA": 6}
_PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 262, 284, 339  # TIFF tags
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its EXIF orientation."""


@dataclass(frozen=True)
class PixelValues:
    """The pixel values of an image with more than 8 bits per channel, without alpha.

    Attributes:
        minimum: The smallest value.
        maximum: The largest value.
        low: Lower end of the range without outliers; see `IMAGE_OUTLIERS`.
        high: Upper end of the range without outliers. For values from 0 to 65535, the largest number of 8, 10, 12, 14
            or 16 bits.
        bulk: About 99 % of the values are at or below this one.
        is_16_bit: Whether all values are integers from 0 to 65535.
    """

    minimum: float
    maximum: float
    low: float
    high: float
    bulk: float
    is_16_bit: bool


@dataclass(frozen=True)
class HighBitDepthImage:
    """An upright image with more than 8 bits per channel.

    Attributes:
        planes: Upper and lower bytes of 16-bit values, both L, LA, RGB or RGBA; or one image of mode I or F.
        is_inverted: Whether the lowest value is white.
        transparency: Content of the tRNS chunk of a PNG file.
    """

    planes: tuple[Image.Image, ...]
    is_inverted: bool = False
    transparency: bytes | None = None

    @property
    def mode(self) -> str:
        """Description of the pixels, such as `16-bit RGB`."""
        names = {
            "I": "32-bit integers",
            "F": "floating point",
            "L": "16-bit grayscale",
            "LA": "16-bit grayscale, alpha",
        }
        mode = self.planes[0].mode
        return names.get(mode, f"16-bit {mode}") + (", white is 0" if self.is_inverted else "")

    def turn_upright(self, orientation: int) -> "HighBitDepthImage":
        """Apply an EXIF orientation from 1 to 8."""
        if orientation not in TRANSPOSITIONS:
            return self
        planes = tuple(plane.transpose(TRANSPOSITIONS[orientation]) for plane in self.planes)
        return HighBitDepthImage(planes, self.is_inverted, self.transparency)

    def encode(self) -> bytes:
        """Encode as PNG; see the module's description."""
        mode = self.planes[0].mode
        if mode in ("I", "F"):
            packed = Image.frombytes("RGBA", self.planes[0].size, self.planes[0].tobytes())
            return _insert_chunk(_save_png(packed), MARKER_CHUNK, self._marker)
        png = _save_png(_join_bytes(*self.planes)) if mode == "L" else _encode_16_bit(*self.planes)
        if self.is_inverted:
            return _insert_chunk(png, MARKER_CHUNK, self._marker)
        return png if self.transparency is None else _insert_chunk(png, b"tRNS", self.transparency)

    @property
    def _marker(self) -> bytes:
        kind = {"I": b"i", "F": b"f"}.get(self.planes[0].mode, b"u")
        return kind + (b"1" if self.is_inverted else b"0")

    def content(self) -> bytes:
        """Return bytes that are equal for images with equal pixels."""
        header = f"{self.planes[0].size}{self.planes[0].mode}{self._marker!r}{self.transparency!r}".encode()
        return header + b"".join(plane.tobytes() for plane in self.planes)

    def measure(self) -> PixelValues:
        """Measure the pixel values."""
        if len(self.planes) == 1:
            return _measure_wide(self.planes[0])
        bands = [name for name in self.planes[0].getbands() if name != "A"]
        pairs = [tuple(plane.getchannel(name) for plane in self.planes) for name in bands]
        return _measure_16_bit(cast("list[tuple[Image.Image, Image.Image]]", pairs))


def read_high_bit_depth(image: ImageFile.ImageFile, data: bytes) -> HighBitDepthImage | None:
    """Read an image if it has more than 8 bits per channel.

    Args:
        image: The image, opened by Pillow but not loaded.
        data: Bytes of its file.

    Returns:
        The image, upright only if its file is TIFF; None if it has 8 or fewer bits per channel.

    Raises:
        Rejection: If pixels are not finite numbers, or in a form that is not supported.
    """
    raw_mode = _raw_mode(image)
    tags = getattr(image, "tag_v2", {})
    is_inverted = tags.get(_PHOTOMETRIC) == 0
    if image.mode == "F" or image.mode.startswith("I"):
        is_unsigned = tags.get(_SAMPLE_FORMAT, (1,))[0] == 1 and image.format == "TIFF"
        image.load()
        return HighBitDepthImage(_split_gray(image, is_unsigned=is_unsigned), is_inverted, find_transparency(data))
    if ";16" not in raw_mode or image.mode not in ("RGB", "RGBA"):
        return None
    if raw_mode.startswith("RGBa"):
        raise Rejection(UNKNOWN_FORMAT, "16-bit pixels with premultiplied alpha are not supported")
    if tags.get(_PLANAR) == 2:
        raise Rejection(UNKNOWN_FORMAT, "16-bit pixels in separate color planes are not supported")
    with Image.open(io.BytesIO(data), formats=(image.format or "",)) as second:
        if raw_mode.startswith("LA"):  # four bytes per pixel: upper and lower byte of the gray value and of alpha
            _set_raw_mode(image, "RGBA")
            image.load()
            parts = image.split()
            return HighBitDepthImage((Image.merge("LA", parts[0::2]), Image.merge("LA", parts[1::2])))
        _set_raw_mode(second, raw_mode[:-1] + _OTHER_BYTE[raw_mode[-1]])
        image.load()
        second.load()
        return HighBitDepthImage((image.copy(), second.copy()), False, find_transparency(data))


def find_transparency(data: bytes) -> bytes | None:
    """Return the content of the tRNS chunk of a PNG file; None if there is none, and for other formats."""
    return find_png_chunk(data, b"tRNS") if data.startswith(PNG_SIGNATURE) else None


def _raw_mode(image: ImageFile.ImageFile) -> str:
    if not image.tile:
        return ""
    arguments = image.tile[0].args
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _set_raw_mode(image: ImageFile.ImageFile, raw_mode: str) -> None:
    """Set which bytes of a file become the channels of an image."""
    image.tile = [
        tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)
        for tile in image.tile
    ]


def _split_gray(image: Image.Image, *, is_unsigned: bool) -> tuple[Image.Image, ...]:
    """Split a grayscale image into upper and lower bytes, if its values are integers from 0 to 65535."""
    if image.mode == "F":
        values = array.array("f", image.tobytes())
        if not math.isfinite(sum(values)):
            raise Rejection(UNKNOWN_FORMAT, "floating-point pixels contain NaN or infinity")
        return (image.copy(),)
    if image.mode == "I":
        low, high = cast("tuple[int, int]", image.getextrema())
        if is_unsigned and low < 0:
            raise Rejection(UNKNOWN_FORMAT, "unsigned 32-bit pixels above 2147483647 are not supported")
        if low < 0 or high > 65535:
            return (image.copy(),)
        raw, step, upper = image.tobytes(), 4, 1 if sys.byteorder == "little" else 2
    else:
        raw, step, upper = image.tobytes(), 2, 0 if image.mode == "I;16B" else 1
    lower = upper - 1 if upper == 1 else upper + 1
    planes = (Image.frombytes("L", image.size, raw[start::step]) for start in (upper, lower))
    return tuple(planes)


def _join_bytes(upper: Image.Image, lower: Image.Image) -> Image.Image:
    raw = bytearray(2 * upper.width * upper.height)
    raw[0::2], raw[1::2] = lower.tobytes(), upper.tobytes()
    return Image.frombytes("I;16", upper.size, bytes(raw))


def _encode_16_bit(upper: Image.Image, lower: Image.Image) -> bytes:
    """Encode as a 16-bit PNG, which Pillow writes for grayscale only (PNG specification, section 11.2)."""
    raw = bytearray(2 * upper.width * upper.height * len(upper.mode))
    raw[0::2], raw[1::2] = upper.tobytes(), lower.tobytes()
    compressor, row_bytes = zlib.compressobj(3), 2 * upper.width * len(upper.mode)
    pixels = [compressor.compress(b"\0" + raw[start : start + row_bytes]) for start in range(0, len(raw), row_bytes)]
    header = struct.pack(">IIBBBBB", upper.width, upper.height, 16, _COLOR_TYPES[upper.mode], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", b"".join(pixels) + compressor.flush()), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)


def _save_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _insert_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    return png[:_HEADER_END] + _chunk(kind, body) + png[_HEADER_END:]


def _measure_16_bit(bands: list[tuple[Image.Image, Image.Image]]) -> PixelValues:
    extrema = [cast("tuple[int, int]", _join_bytes(*band).getextrema()) for band in bands]
    histogram = [sum(counts) for counts in zip(*(upper.histogram() for upper, _ in bands), strict=True)]
    total = sum(histogram)
    fits = (bits for bits in (8, 10, 12, 14) if sum(histogram[2 ** (bits - 8) :]) <= IMAGE_OUTLIERS * total)
    bulk = next(index for index, below in enumerate(accumulate(histogram)) if below >= _BULK * total)
    return PixelValues(
        minimum=min(low for low, _ in extrema),
        maximum=max(high for _, high in extrema),
        low=0,
        high=2 ** next(fits, 16) - 1,
        bulk=256 * bulk + 255,
        is_16_bit=True,
    )


def _measure_wide(image: Image.Image) -> PixelValues:
    minimum, maximum = cast("tuple[float, float]", image.getextrema())
    return PixelValues(
        minimum=minimum,
        maximum=maximum,
        low=_quantile(image, IMAGE_OUTLIERS)[0],
        high=_quantile(image, 1 - IMAGE_OUTLIERS)[1],
        bulk=_quantile(image, _BULK)[1],
        is_16_bit=False,
    )


def _quantile(image: Image.Image, share: float) -> tuple[float, float]:
    """Return an interval that contains a quantile, by histograms of ever smaller intervals."""
    low, high = cast("tuple[float, float]", image.getextrema())
    wanted, below = share * image.width * image.height, 0
    for _ in range(_MAX_HISTOGRAMS):
        is_narrow = high - low <= 1e-4 * max(abs(low), abs(high))
        if is_narrow or (image.mode == "I" and high - low < 256):
            break
        width = (high - low) / 255  # Pillow's bins
        sums = list(accumulate(image.histogram(extrema=(low, high)), initial=below))
        index = next((index for index, count in enumerate(sums[1:]) if count >= wanted), 255)
        below = sums[index]
        low, high = low + index * width, min(high, low + (index + 1) * width)
        if image.mode == "I":
            low, high = math.floor(low), math.ceil(high)
    return low, high
