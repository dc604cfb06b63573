"""Resizes images to the input size of a model in TensorFlow, inside or outside a graph.

All sizes and positions are integers and are rounded down, so that every caller and every library can repeat them. A
side is never shorter than 1 pixel, whatever the aspect ratio:

- stretch: the whole image, without preserving its aspect ratio
- crop: the central part of the image that has the aspect ratio of the input, as `keras.layers.Resizing` with
  `crop_to_aspect_ratio`
- pad: the whole image, scaled until one side fits and centered on black, the color of `tf.image.resize_with_pad`

Images are cropped before they are resized, and padded afterwards: an image of 1x5000 pixels needs no more memory than
another one with as many pixels, and black does not blend into its edges.
"""

import tensorflow as tf

from topwork.spec.dataset import ImageFit


def resize(image: tf.Tensor, size: tuple[int, int], fit: ImageFit = "stretch") -> tf.Tensor:
    """Resize images to an exact size: bilinear with antialiasing, rounded to integers.

    Args:
        image: Any numeric dtype, values 0..255, (height, width, 3) or (batch, height, width, 3).
        size: Target height and width in pixels.
        fit: How an image with another aspect ratio becomes an image of this size. One that has this size already is
            returned unchanged.

    Returns:
        float32 with the same rank as `image`. Values are integers 0..255, so a cast to uint8 is lossless.

    Example:
        >>> resize(decode(Path("cat.jpg").read_bytes()), (224, 224), "crop").shape
        TensorShape([224, 224, 3])
    """
    if fit == "crop":
        return _resize(_crop(image, size), size)
    return _pad(image, size) if fit == "pad" else _resize(image, size)


def _resize(image: tf.Tensor, size: tuple[int, int] | tf.Tensor) -> tf.Tensor:
    resized = tf.image.resize(image, size, method="bilinear", antialias=True)
    return tf.clip_by_value(tf.round(resized), 0.0, 255.0)


def _crop(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Return the largest central part with the aspect ratio of `size`."""
    shape = _shape(image)
    inner = _fit_inside(size, shape)
    top, left = tf.unstack((shape - inner) // 2)
    height, width = tf.unstack(inner)
    return image[..., top : top + height, left : left + width, :]


def _pad(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resize images until one side fits, and center them on black."""
    inner = _fit_inside(_shape(image), size)
    before = (size - inner) // 2
    sides = tf.stack([before, size - inner - before], axis=1)
    # No padding of the batch and the channels.
    paddings = tf.pad(sides, [[len(image.shape) - 3, 1], [0, 0]])
    padded = tf.pad(_resize(image, tf.cast(inner, tf.int32)), paddings)
    return tf.ensure_shape(padded, (*image.shape[:-3], *size, image.shape[-1]))


def _shape(image: tf.Tensor) -> tf.Tensor:
    # int64: products of sides must not overflow.
    return tf.shape(image, tf.int64)[-3:-1]


def _fit_inside(inner: tf.Tensor | tuple[int, int], outer: tf.Tensor | tuple[int, int]) -> tf.Tensor:
    """Scale a height and width to the largest that fit into others, int64 (2,); at least 1 pixel each."""
    inner, outer = tf.convert_to_tensor(inner, tf.int64), tf.convert_to_tensor(outer, tf.int64)
    return tf.maximum(tf.minimum(outer, outer[::-1] * inner // inner[::-1]), 1)
