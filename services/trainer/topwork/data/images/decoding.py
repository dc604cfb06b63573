"""Decoding in TensorFlow: one code path for training, evaluation, `topwork predict` and serving.

The pixels of every file equal those of Pillow, bit for bit: transparency is composited on white, the EXIF orientation
is applied, and values with more than 8 bits are mapped by the value range of the dataset. A file for which a graph
cannot do this, such as a TIFF file, is an error and never another image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tensorflow as tf

from topwork.data.images.exif_orientation import apply_orientation, jpeg_orientation, png_orientation, webp_orientation
from topwork.data.images.high_bit_depth import MARKER_CHUNK
from topwork.data.images.resizing import resize
from topwork.data.images.value_range import FULL_RANGE, ValueRange
from topwork.spec.dataset import ImageFit

# Bytes before the pixels that are inspected; shorter files are padded with zeros.
_HEADER_BYTES = 64
_UNSUPPORTED = (
    "The file is not a JPEG, PNG, WebP, GIF or BMP image that a TensorFlow graph decodes exactly. Convert it to PNG. "
    "Not supported: TIFF, animated WebP, transparent GIF, and BMP that is compressed or has 1, 4 or 16 bits per pixel."
)


def decode(encoded: tf.Tensor, value_range: ValueRange = FULL_RANGE) -> tf.Tensor:
    """Decode an image file to RGB, inside or outside a graph.

    Args:
        encoded: Scalar string with the bytes of a JPEG, PNG, WebP, GIF or BMP file, or of a stored image. Only the
            first frame of a GIF is used.
        value_range: Values that become 0 and 255 in images with more than 8 bits per channel.

    Returns:
        uint8 (height, width, 3).

    Raises:
        tf.errors.InvalidArgumentError: If the file is damaged, or cannot be decoded exactly.
    """
    # A function of its own is traced only once: that takes a second.
    return _decode(tf.convert_to_tensor(encoded), tf.constant(value_range, tf.float64))


@tf.function(  # type: ignore[untyped-decorator]
    input_signature=[tf.TensorSpec((), tf.string), tf.TensorSpec((2,), tf.float64)], autograph=False
)
def _decode(encoded: tf.Tensor, value_range: tf.Tensor) -> tf.Tensor:
    padded = tf.strings.join([encoded, b"\0" * _HEADER_BYTES])
    header = tf.io.decode_raw(tf.strings.substr(padded, 0, _HEADER_BYTES), tf.uint8)
    branches: list[tuple[tf.Tensor, Callable[[], tf.Tensor]]] = [
        (_starts_with(header, b"\xff\xd8\xff"), lambda: _decode_jpeg(encoded, header)),
        (_starts_with(header, b"\x89PNG"), lambda: _decode_png(encoded, header, value_range)),
        (_is_still_webp(header), lambda: _decode_webp(encoded)),
        (_starts_with(header, b"GIF8"), lambda: _decode_gif(encoded)),
        (_is_plain_bmp(header), lambda: _decode_bmp(encoded, header)),
    ]
    return tf.ensure_shape(_first_match(branches), (None, None, 3))


def is_decodable(encoded: bytes) -> bool:
    """Check whether TensorFlow can decode an image file.

    Args:
        encoded: Bytes of the file.

    Returns:
        True if `decode` accepts the file.
    """
    try:
        decode(tf.constant(encoded))
    except tf.errors.InvalidArgumentError:
        return False
    return True


def prepare_decoding() -> None:
    """Load the graph of `decode`. Call it before several threads call `is_decodable`.

    TensorFlow loads a graph at its first call. That takes 0.6 s, and each of several threads would do it again.
    """
    is_decodable(b"")


@dataclass(frozen=True)
class Preprocessing:
    """How image files become the input of a model; part of the exported SavedModel.

    Attributes:
        value_range: Values that become 0 and 255 in images with more than 8 bits per channel.
        image_fit: How images with another aspect ratio than the input are resized.

    Example:
        >>> Preprocessing(image_fit="crop").load(Path("cat.jpg").read_bytes(), (224, 224)).shape
        TensorShape([224, 224, 3])
    """

    value_range: ValueRange = FULL_RANGE
    image_fit: ImageFit = "stretch"

    def load(self, encoded: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
        """Decode and resize an image file, inside or outside a graph.

        Args:
            encoded: Scalar string; see the function `decode`.
            size: Height and width in pixels.

        Returns:
            float32 (height, width, 3). Values are integers 0..255.
        """
        return tf.ensure_shape(self.resize(self.decode(encoded), size), (*size, 3))

    def decode(self, encoded: tf.Tensor) -> tf.Tensor:
        """Decode an image file; see the function `decode`."""
        return decode(encoded, self.value_range)

    def resize(self, image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
        """Resize images; see the function `resize`."""
        return resize(image, size, self.image_fit)


def _first_match(branches: list[tuple[tf.Tensor, Callable[[], tf.Tensor]]]) -> tf.Tensor:
    """Run the first branch whose condition holds. If none does, the file is not supported."""
    conditions = tf.stack([condition for condition, _ in branches])
    is_supported = tf.debugging.Assert(tf.reduce_any(conditions), [_UNSUPPORTED])
    with tf.control_dependencies([is_supported] if is_supported is not None else []):
        number = tf.argmax(tf.cast(conditions, tf.int32), output_type=tf.int32)
    return tf.switch_case(number, [branch for _, branch in branches])


def _starts_with(header: tf.Tensor, signature: bytes, position: int = 0) -> tf.Tensor:
    return tf.reduce_all(header[position : position + len(signature)] == tf.constant(list(signature), tf.uint8))


def _little_endian(header: tf.Tensor, position: int, size: int) -> tf.Tensor:
    weights = tf.constant([256**index for index in range(size)], tf.int64)
    return tf.reduce_sum(tf.cast(header[position : position + size], tf.int64) * weights)


def _decode_jpeg(encoded: tf.Tensor, header: tf.Tensor) -> tf.Tensor:
    # TensorFlow's default is a faster, less accurate transform.
    pixels = tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")
    # Most files have no EXIF block: their quantization table follows right after the JFIF segment of 18 bytes.
    is_plain = _starts_with(header, b"\xff\xe0\x00\x10", 2) & _starts_with(header, b"\xff\xdb", 20)
    return tf.cond(is_plain, lambda: pixels, lambda: apply_orientation(pixels, jpeg_orientation(encoded)))


def _decode_png(encoded: tf.Tensor, header: tf.Tensor, value_range: tf.Tensor) -> tf.Tensor:
    bit_depth, color_type = header[24], header[25]
    # Most files have no chunk before the pixels, so neither EXIF data nor transparent colors.
    is_plain = _starts_with(header, b"IDAT", 37) & (bit_depth <= 8) & ((color_type == 0) | (color_type == 2))
    return tf.cond(
        is_plain, lambda: tf.io.decode_png(encoded, channels=3), lambda: _decode_any_png(encoded, header, value_range)
    )


def _decode_any_png(encoded: tf.Tensor, header: tf.Tensor, value_range: tf.Tensor) -> tf.Tensor:
    is_packed = _starts_with(header, MARKER_CHUNK, 37) & (header[41] != ord("u"))
    pixels = tf.case(
        [
            (is_packed, lambda: _decode_packed(encoded, header, value_range)),
            (header[24] == 16, lambda: _decode_16_bit(encoded, header, value_range)),
        ],
        default=lambda: _composite(_decode_8_bit_png(encoded, header[24])),
    )
    return apply_orientation(pixels, png_orientation(encoded))


def _decode_8_bit_png(encoded: tf.Tensor, bit_depth: tf.Tensor) -> tf.Tensor:
    pixels = tf.io.decode_png(encoded, channels=4)
    # TensorFlow fills the alpha of opaque images with the largest value before the pixels are scaled to 8 bits.
    opaque = tf.bitwise.left_shift(tf.ones((), tf.int32), tf.cast(bit_depth, tf.int32)) - 1
    is_filled = tf.reduce_all(tf.cast(pixels[..., 3], tf.int32) == opaque)
    return tf.cond(
        is_filled,
        lambda: tf.concat([pixels[..., :3], tf.fill(tf.shape(pixels[..., :1]), tf.constant(255, tf.uint8))], -1),
        lambda: pixels,
    )


def _decode_16_bit(encoded: tf.Tensor, header: tf.Tensor, value_range: tf.Tensor) -> tf.Tensor:
    pixels = tf.io.decode_png(encoded, channels=4, dtype=tf.uint16)
    is_inverted = _starts_with(header, MARKER_CHUNK, 37) & (header[42] == ord("1"))
    colors = _map_values(pixels[..., :3], is_inverted, value_range)
    alpha = tf.cast(tf.round(tf.cast(pixels[..., 3:], tf.float32) / 257), tf.uint8)
    return _composite(tf.concat([colors, alpha], -1))


def _decode_packed(encoded: tf.Tensor, header: tf.Tensor, value_range: tf.Tensor) -> tf.Tensor:
    """Decode values that are not 16-bit integers; see `topwork.data.images.high_bit_depth`."""
    pixels = tf.io.decode_png(encoded, channels=4)
    values = tf.where(
        header[41] == ord("f"),
        tf.cast(tf.bitcast(pixels, tf.float32), tf.float64),
        tf.cast(tf.bitcast(pixels, tf.int32), tf.float64),
    )
    gray = _map_values(values[..., tf.newaxis], header[42] == ord("1"), value_range)
    return tf.repeat(gray, 3, axis=-1)


def _map_values(values: tf.Tensor, is_inverted: tf.Tensor, value_range: tf.Tensor) -> tf.Tensor:
    low, high = value_range[0], value_range[1]
    scaled = tf.clip_by_value((tf.cast(values, tf.float64) - low) / (high - low), 0.0, 1.0)
    scaled = tf.where(is_inverted, 1.0 - scaled, scaled)
    return tf.cast(tf.round(scaled * 255.0), tf.uint8)


def _composite(pixels: tf.Tensor) -> tf.Tensor:
    """Composite uint8 RGBA on white, as Pillow's `alpha_composite`."""

    def blend() -> tf.Tensor:
        alpha = tf.cast(pixels[..., 3:], tf.int32)
        shifted = (tf.cast(pixels[..., :3], tf.int32) * alpha + 255 * (255 - alpha) + 128) * 128
        return tf.cast(((shifted // 256 + shifted) // 256) // 128, tf.uint8)

    return tf.cond(tf.reduce_all(pixels[..., 3] == 255), lambda: pixels[..., :3], blend)


def _is_still_webp(header: tf.Tensor) -> tf.Tensor:
    is_webp = _starts_with(header, b"RIFF") & _starts_with(header, b"WEBP", 8)
    # TensorFlow 2.21 writes past the end of a buffer when it decodes only the first frame of an animation.
    is_animated = _starts_with(header, b"VP8X", 12) & (
        tf.bitwise.bitwise_and(header[20], tf.constant(2, tf.uint8)) != 0
    )
    return is_webp & ~is_animated


def _decode_webp(encoded: tf.Tensor) -> tf.Tensor:
    # Not tf.io.decode_webp: model servers of older TensorFlow versions do not have this op and would not start.
    pixels = tf.io.decode_image(encoded, expand_animations=False)
    pixels = tf.ensure_shape(pixels, (None, None, None))
    pixels = tf.cond(tf.shape(pixels)[-1] == 4, lambda: _composite(pixels), lambda: pixels)
    return apply_orientation(pixels, webp_orientation(encoded))


def _decode_gif(encoded: tf.Tensor) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(~_has_transparent_color(encoded), [_UNSUPPORTED])]):
        return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _has_transparent_color(encoded: tf.Tensor) -> tf.Tensor:
    """Check the extension blocks before the first frame of a GIF file (GIF 89a, sections 18 and 23)."""
    data = tf.cast(tf.io.decode_raw(tf.strings.join([encoded, b"\0" * 16]), tf.uint8), tf.int32)
    has_palette, palette_size = data[10] >= 128, 3 * tf.bitwise.left_shift(2, data[10] % 8)

    def is_extension(position: tf.Tensor, in_block: tf.Tensor, is_transparent: tf.Tensor) -> tf.Tensor:
        return (position + 4 < tf.size(data)) & ~is_transparent & (in_block | (data[position] == 0x21))

    def advance(position: tf.Tensor, in_block: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        is_control = ~in_block & (data[position + 1] == 0xF9)
        following = tf.where(in_block, position + 1 + data[position], position + 2)
        return following, ~in_block | (data[position] > 0), is_control & (data[position + 3] % 2 == 1)

    start = 13 + tf.where(has_palette, palette_size, 0)
    _, _, is_transparent = tf.while_loop(is_extension, advance, (start, tf.constant(False), tf.constant(False)))
    return is_transparent


def _is_plain_bmp(header: tf.Tensor) -> tf.Tensor:
    bits = _little_endian(header, 28, 2)
    is_plain = (_little_endian(header, 14, 4) >= 40) & (_little_endian(header, 30, 4) == 0)
    return _starts_with(header, b"BM") & is_plain & ((bits == 8) | (bits == 24) | (bits == 32))


def _decode_bmp(encoded: tf.Tensor, header: tf.Tensor) -> tf.Tensor:
    pixels = tf.ensure_shape(tf.io.decode_bmp(encoded), (None, None, None))

    def look_up_colors() -> tf.Tensor:
        """TensorFlow returns the index of each pixel in the palette, which consists of blue, green, red and padding."""
        first = 14 + _little_endian(header, 14, 4)
        data = tf.strings.substr(encoded, first, _little_endian(header, 10, 4) - first)
        palette = tf.reshape(tf.io.decode_raw(data, tf.uint8)[: 4 * (tf.strings.length(data) // 4)], (-1, 4))
        return tf.gather(palette[:, 2::-1], tf.cast(pixels[..., 0], tf.int32))

    return tf.cond(header[28] == 8, look_up_colors, lambda: pixels[..., :3])
