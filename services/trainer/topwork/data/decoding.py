"""Decoding and resizing with TensorFlow: the one way in training, evaluation and serving."""

import tensorflow as tf


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode an image file to RGB.

    Args:
        encoded: JPEG, PNG, GIF (its first frame) or BMP file, scalar string.

    Returns:
        uint8 (height, width, 3).
    """
    return tf.io.decode_image(encoded, channels=3, dtype=tf.uint8, expand_animations=False)


def is_readable(encoded: bytes) -> bool:
    """Say whether TensorFlow decodes an image file.

    Args:
        encoded: The file.

    Returns:
        Whether `decode` will.
    """
    try:
        decode(encoded)
    except tf.errors.InvalidArgumentError:
        return False
    return True


def resize(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resize to an exact size, without regard to the aspect ratio: bilinear, antialiased, rounded to whole values.

    Args:
        image: Any number type, values 0..255, (height, width, 3) or (batch, height, width, 3).
        size: Height and width in pixels.

    Returns:
        float32 (height, width, 3) or (batch, height, width, 3) with whole values 0..255, as uint8 would hold them.
    """
    resized = tf.image.resize(image, size, method="bilinear", antialias=True)
    return tf.clip_by_value(tf.round(resized), 0.0, 255.0)
