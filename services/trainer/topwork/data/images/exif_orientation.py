"""EXIF orientation inside a TensorFlow graph: finds the EXIF block of an image file and turns the image upright."""

from collections.abc import Callable

import tensorflow as tf

from topwork.data.images.image_metadata import EXIF_HEADER

_ORIENTATION = 0x0112
_UPRIGHT = 1
_MAX_SEGMENTS = 4096
_MAX_ENTRIES = 1024

# Position of a segment -> position of the next one (-1 if this is the last) and of the EXIF block in it, or -1.
_Step = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def jpeg_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Read the EXIF orientation of a JPEG file.

    Args:
        encoded: Scalar string.

    Returns:
        int32 scalar from 1 to 8; 1 is upright or unknown.
    """
    return _orientation(encoded, 2, _next_jpeg_segment)


def png_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Read the EXIF orientation of a PNG file whose eXIf chunk precedes the pixels; see `jpeg_orientation`."""
    return _orientation(encoded, 8, _next_png_chunk)


def webp_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Read the EXIF orientation of a WebP file; see `jpeg_orientation`."""
    return _orientation(encoded, 12, _next_webp_chunk)


def apply_orientation(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turn an image upright.

    Args:
        pixels: uint8 (height, width, 3).
        orientation: int32 scalar from 1 to 8.

    Returns:
        uint8 (height, width, 3), or (width, height, 3) for orientations 5 to 8.
    """
    turned = tf.cond(orientation >= 5, lambda: tf.transpose(pixels, (1, 0, 2)), lambda: pixels)
    flips_rows = tf.reduce_any(orientation == (3, 4, 7, 8))
    flips_columns = tf.reduce_any(orientation == (2, 3, 6, 7))
    turned = tf.cond(flips_rows, lambda: turned[::-1], lambda: turned)
    return tf.cond(flips_columns, lambda: turned[:, ::-1], lambda: turned)


def _orientation(encoded: tf.Tensor, first: int, step: _Step) -> tf.Tensor:
    data = tf.io.decode_raw(encoded, tf.uint8)

    def is_searching(position: tf.Tensor, exif: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        return (exif < 0) & (position >= 0) & (position + 12 < tf.size(data)) & (number < _MAX_SEGMENTS)

    def advance(position: tf.Tensor, _: tf.Tensor, number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return (*step(data, position), number + 1)

    _, exif, _ = tf.while_loop(is_searching, advance, (tf.constant(first), tf.constant(-1), tf.constant(0)))
    return tf.cond(exif >= 0, lambda: _read_tag(data, exif), lambda: tf.constant(_UPRIGHT))


def _next_jpeg_segment(data: tf.Tensor, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    head = tf.cast(data[position : position + 10], tf.int32)
    marker = head[1]
    is_exif = (marker == 0xE1) & tf.reduce_all(head[4:] == tf.constant(list(EXIF_HEADER)))
    is_end = (head[0] != 0xFF) | (marker == 0xDA) | (marker == 0xD9) | (marker <= 0x01)
    is_fill = marker == 0xFF
    following = tf.where(is_fill, position + 1, position + 2 + 256 * head[2] + head[3])
    return tf.where(is_end, -1, following), tf.where(is_exif, position + 10, -1)


def _next_png_chunk(data: tf.Tensor, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    length = _number(data, position, 4, is_little=tf.constant(False))
    kind = data[position + 4 : position + 8]
    is_end = _equals(kind, b"IDAT") | _equals(kind, b"IEND")
    return tf.where(is_end, -1, position + 12 + length), tf.where(_equals(kind, b"eXIf"), position + 8, -1)


def _next_webp_chunk(data: tf.Tensor, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    length = _number(data, position + 4, 4, is_little=tf.constant(True))
    # Some writers put the header of a JPEG segment before the block.
    start = position + 8 + tf.where(_equals(data[position + 8 : position + 14], EXIF_HEADER), 6, 0)
    is_exif = _equals(data[position : position + 4], b"EXIF")
    return position + 8 + length + length % 2, tf.where(is_exif, start, -1)


def _equals(data: tf.Tensor, expected: bytes) -> tf.Tensor:
    return (tf.size(data) == len(expected)) & tf.reduce_all(
        tf.pad(data, [[0, len(expected) - 0]])[: len(expected)] == tf.constant(list(expected), tf.uint8)
    )


def _number(data: tf.Tensor, position: tf.Tensor, size: int, is_little: tf.Tensor) -> tf.Tensor:
    """Read unsigned integers at positions of any shape; bytes past the end are 0, and large values are limited."""
    offsets = position[..., tf.newaxis] + tf.range(size)
    is_inside = (offsets >= 0) & (offsets < tf.size(data))
    digits = tf.cast(tf.gather(data, tf.clip_by_value(offsets, 0, tf.size(data) - 1)), tf.int64)
    digits = tf.where(is_inside, digits, 0)
    digits = tf.where(is_little, digits, tf.reverse(digits, [-1]))
    value = tf.reduce_sum(digits * tf.constant([256**index for index in range(size)], tf.int64), -1)
    return tf.cast(tf.minimum(value, 2**30), tf.int32)


def _read_tag(data: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Read the orientation from an EXIF block, which has the layout of a TIFF file."""
    is_little = data[start] == ord("I")
    directory = start + _number(data, start + 4, 4, is_little)
    entries = tf.minimum(_number(data, directory, 2, is_little), _MAX_ENTRIES)
    positions = directory + 2 + 12 * tf.range(entries)
    is_orientation = (_number(data, positions, 2, is_little) == _ORIENTATION) & (
        _number(data, positions + 2, 2, is_little) == 3  # a 16-bit number
    )
    value = tf.reduce_max(tf.where(is_orientation, _number(data, positions + 8, 2, is_little), 0))
    return tf.where((value >= 1) & (value <= 8), value, _UPRIGHT)
