"""Image decoding and resizing in TensorFlow, shared by training, evaluation and serving."""

import tensorflow as tf


def decode(encoded: tf.Tensor) -> tf.Tensor:
    """Decode an image file to RGB.

    Args:
        encoded: Scalar string with the bytes of a JPEG, PNG, BMP or GIF file. Only the first frame of a GIF is used.

    Returns:
        uint8 (height, width, 3).
    """
    return tf.io.decode_image(encoded, channels=3, dtype=tf.uint8, expand_animations=False)


def is_decodable(encoded: bytes) -> bool:
    """Check whether TensorFlow can decode an image file.

    Args:
        encoded: Bytes of the file.

    Returns:
        True if `decode` accepts the file.
    """
    try:
        decode(encoded)
    except tf.errors.InvalidArgumentError:
        return False
    return True


def resize(image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """Resize images to an exact size: bilinear with antialiasing, rounded to integers.

    The aspect ratio is not preserved.

    Args:
        image: Any numeric dtype, values 0..255, (height, width, 3) or (batch, height, width, 3).
        size: Target height and width in pixels.

    Returns:
        float32 with the same rank as `image`. Values are integers 0..255, so a cast to uint8 is lossless.

    Example:
        >>> resize(decode(Path("cat.jpg").read_bytes()), (224, 224)).shape
        TensorShape([224, 224, 3])
    """
    resized = tf.image.resize(image, size, method="bilinear", antialias=True)
    return tf.clip_by_value(tf.round(resized), 0.0, 255.0)
