"""The value range of a dataset with more than 8 bits per channel."""

import io

import numpy as np
import pytest
from PIL import Image

from topwork.data.images.image_validation import validate_image
from topwork.data.images.value_range import describe_value_range, resolve_value_range, summarize_values
from topwork.errors import DataError

RANDOM = np.random.default_rng(3)


def measure(values: np.ndarray):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return validate_image(file.getvalue()).values


def images(bits: int, count: int = 3, dtype=np.uint16):
    return [measure(RANDOM.integers(0, 2**bits, (64, 64)).astype(dtype)) for _ in range(count)]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_automatic_range_is_the_smallest_bit_depth_that_holds_the_values(bits):
    statistics = summarize_values(images(bits))
    assert resolve_value_range("auto", statistics) == (0.0, 2.0**bits - 1)
    assert statistics.images_by_bits == {bits: 3}


def test_automatic_range_is_the_same_with_more_images_of_the_same_kind():
    values = images(12, 4)
    assert summarize_values(values[:1]).automatic_range == summarize_values(values).automatic_range


def test_automatic_range_ignores_hot_pixels():
    picture = RANDOM.integers(0, 4096, (200, 200)).astype(np.uint16)
    picture[5, 5:8] = 65535
    statistics = summarize_values([measure(picture)])
    assert (statistics.automatic_range, statistics.maximum) == ((0.0, 4095.0), 65535)
    assert "clipped" in describe_value_range((0.0, 4095.0), statistics)[-1]


def test_automatic_range_ignores_one_unusual_image_in_a_hundred():
    ordinary, unusual = images(12, 1) * 99, images(16, 1)
    assert summarize_values(ordinary + unusual).automatic_range == (0.0, 4095.0)
    assert summarize_values(ordinary + unusual * 5).automatic_range == (0.0, 65535.0)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_automatic_range_of_other_values_is_widened_to_two_digits(dtype):
    values = RANDOM.integers(-1024, 3072, (64, 64)).astype(dtype)
    assert summarize_values([measure(values)]).automatic_range == (-1100.0, 3100.0)


def test_automatic_range_of_fractions_is_one():
    values = RANDOM.random((64, 64)).astype(np.float32)
    values[0, 0] = 0.9999
    assert summarize_values([measure(values)]).automatic_range == (0.0, 1.0)


def test_automatic_range_of_floats_ignores_a_huge_outlier():
    values = RANDOM.random((200, 200)).astype(np.float32)
    values[3, 3] = 1e30
    low, high = summarize_values([measure(values)]).automatic_range
    assert (low, high) == (0.0, 1.0)


def test_constant_image_has_a_range():
    low, high = summarize_values([measure(np.full((8, 8), 3.5, np.float32))]).automatic_range
    assert low <= 3.5 < high


def test_full_range_requires_16_bit_integers():
    assert resolve_value_range("full", summarize_values(images(12))) == (0.0, 65535.0)
    with pytest.raises(DataError, match=r"valueRange is full, .* from 0\.\d+ to 0\.\d+\. Set valueRange: auto"):
        resolve_value_range("full", summarize_values([measure(RANDOM.random((8, 8)).astype(np.float32))]))


def test_explicit_range_is_used():
    assert resolve_value_range((-5, 10), None) == (-5.0, 10.0)


def test_dark_images_are_reported():
    statistics = summarize_values(images(12))
    assert "almost black" in describe_value_range((0.0, 65535.0), statistics)[1]
    assert len(describe_value_range((0.0, 4095.0), statistics)) == 1
    mixed = summarize_values(images(12, 2) + images(16, 4))
    assert "2 of these images use less than an eighth" in describe_value_range(mixed.automatic_range, mixed)[1]


def test_dataset_with_8_bits_has_no_statistics():
    assert measure(np.zeros((8, 8), np.uint8)) is None
    assert summarize_values([]) is None
