"""Properties of stratified splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.data.splits.stratification import allocate

FRACTIONS = st.lists(st.integers(1, 98), min_size=1, max_size=3).filter(lambda parts: sum(parts) <= 100)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), FRACTIONS)
def test_every_image_is_used_at_most_once_and_every_class_is_in_every_split(sizes, percent):
    counts = allocate(sizes, [part / 100 for part in percent])
    assert (counts >= 0).all()
    assert (counts.sum(axis=1) <= sizes).all()
    if sum(percent) == 100:
        assert counts.sum(axis=1).tolist() == sizes
    large = np.array(sizes) >= len(percent)
    assert (counts[large] >= 1).all()


@pytest.mark.parametrize(
    ("size", "expected"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [3, 1, 1]), (60, [58, 1, 1]), (200, [196, 2, 2])]
)
def test_small_class_has_an_image_in_each_split(size, expected):
    assert allocate([size], [0.98, 0.01, 0.01]).tolist() == [expected]


@given(st.lists(st.integers(200, 3000), min_size=1, max_size=40), FRACTIONS)
def test_sizes_differ_from_the_fractions_by_at_most_one_image(sizes, percent):
    fractions = np.array(percent) / 100
    counts = allocate(sizes, fractions.tolist())
    assert (np.abs(counts - np.outer(sizes, fractions)) < 2).all()
    assert (np.abs(counts.sum(axis=0) - fractions * sum(sizes)) <= 1 + 1e-6).all()


def test_images_of_small_classes_are_all_used():
    assert allocate([2, 6], [0.8, 0.2]).tolist() == [[1, 1], [5, 1]]


@pytest.mark.parametrize("sizes", [[1], [2, 1], [0, 5]])
def test_classes_with_too_few_images_are_in_the_first_splits(sizes):
    counts = allocate(sizes, [0.8, 0.1, 0.1])
    assert counts.sum(axis=1).tolist() == sizes
    assert (np.diff(counts, axis=1) <= 0).all()
