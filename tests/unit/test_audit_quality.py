"""Blank, blurred and tiny images."""

from importlib import resources

import numpy as np
from PIL import Image, ImageFilter

from topwork.audit.quality import find_blank, find_blurred, find_tiny
from topwork.data.images.signature import sign_high_bit_depth, sign_image


def sharp_photographs():
    """Rooftops and trees of a photograph, without its sky."""
    image = Image.open(str(resources.files("sklearn.datasets") / "images" / "china.jpg"))
    return [image.crop((x, y, x + 80, y + 80)) for x in range(0, 560, 80) for y in range(240, 400, 80)]


def test_a_blurred_photograph_is_found_among_sharp_ones():
    images = sharp_photographs()
    images.append(images[3].filter(ImageFilter.GaussianBlur(4)))
    sharpness = np.array([sign_image(image).sharpness for image in images], np.float32)
    assert np.flatnonzero(find_blurred(sharpness, np.zeros(len(images), bool))).tolist() == [len(images) - 1]


def test_blank_images_are_not_also_blurred():
    sharpness = np.array([900.0, 1000.0, 1100.0, 0.0], np.float32)
    assert not find_blurred(sharpness, np.array([False, False, False, True])).any()
    assert not find_blurred(np.zeros(2, np.float32), np.ones(2, bool)).any()


def test_images_of_one_color_are_blank():
    thumbnails = np.full((2, 32, 32), 90, np.uint8)
    thumbnails[1, :16] = 120
    assert find_blank(thumbnails).tolist() == [True, False]


def test_images_smaller_than_half_of_the_image_size_are_tiny():
    width, height = np.array([112, 111, 500], np.uint32), np.array([112, 300, 90], np.uint32)
    assert find_tiny(width, height, (224, 224)).tolist() == [False, True, True]


def test_signature_does_not_depend_on_the_bit_depth():
    gray = sharp_photographs()[0].convert("L")
    wide = gray.convert("I").point(lambda value: value * 16)
    low, high = gray.getextrema()
    stretched = gray.point(lambda value: (value - low) * 255 / (high - low))
    deep = sign_high_bit_depth((wide,), is_inverted=False)
    expected = np.frombuffer(sign_image(stretched).thumbnail, np.uint8).astype(int)
    assert np.abs(np.frombuffer(deep.thumbnail, np.uint8) - expected).max() <= 1
    inverted = sign_high_bit_depth((wide,), is_inverted=True)
    assert np.abs(255 - np.frombuffer(inverted.thumbnail, np.uint8).astype(int) - expected).max() <= 2


def test_upper_and_lower_bytes_of_16_bit_images_are_joined():
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    planes = tuple(Image.fromarray(part.astype(np.uint8)) for part in (values >> 8, values & 255))
    thumbnail = np.frombuffer(sign_high_bit_depth(planes, is_inverted=False).thumbnail, np.uint8)
    assert np.all(np.diff(thumbnail.astype(int)) >= 0 - 1)
    assert thumbnail[0] <= 4
    assert thumbnail[-1] >= 251
