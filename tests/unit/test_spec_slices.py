"""Parsing of TFDS slices and detection of overlaps."""

import pytest
from pydantic_core import PydanticCustomError

from topwork.spec.slices import Slice, parse_slices


@pytest.mark.parametrize(
    ("text", "slices"),
    [
        ("train", (Slice("train", "train", (0, 0), (100, 0)),)),
        ("train[:]", (Slice("train[:]", "train", (0, 0), (100, 0)),)),
        ("train[:40%]", (Slice("train[:40%]", "train", (0, 0), (40, 0)),)),
        ("train[40%:50%]", (Slice("train[40%:50%]", "train", (40, 0), (50, 0)),)),
        ("train[-10%:]", (Slice("train[-10%:]", "train", (90, 0), (100, 0)),)),
        ("train[100:1_000]", (Slice("train[100:1_000]", "train", (0, 100), (0, 1000)),)),
        ("train[-50:]", (Slice("train[-50:]", "train", (100, -50), (100, 0)),)),
        ("train[10%:-50]", (Slice("train[10%:-50]", "train", (10, 0), (100, -50)),)),
        ("a + b[1:]", (Slice("a", "a", (0, 0), (100, 0)), Slice("b[1:]", "b", (0, 1), (100, 0)))),
    ],
)
def test_parse_slices(text: str, slices: tuple[Slice, ...]) -> None:
    assert parse_slices(text) == slices


@pytest.mark.parametrize(
    "text", ["", "train[", "train[:a]", "train[1]", "train[::2]", "train+", "train[:4shard]", "train[50%:50%]", "[:3]"]
)
def test_parse_slices_rejects_invalid_text(text: str) -> None:
    with pytest.raises(PydanticCustomError):
        parse_slices(text)


@pytest.mark.parametrize(
    ("one", "other", "overlaps"),
    [
        ("train[:40%]", "train[40%:]", False),
        ("train[:41%]", "train[40%:]", True),
        ("train[:40%]", "test[:40%]", False),
        ("train", "train[:1]", True),
        ("train[:500]", "train[500:]", False),
        ("train[:501]", "train[500:]", True),
        ("train[:-100]", "train[-100:]", False),
        ("train[:-100]", "train[-101:]", True),
        ("train[:90%]", "train[-10%:]", False),
        # This depends on the size of the split; it is checked again when the data is split.
        ("train[:500]", "train[50%:]", False),
    ],
)
def test_overlap_is_detected_if_it_is_independent_of_the_split_size(one: str, other: str, overlaps: bool) -> None:
    (a,), (b,) = parse_slices(one), parse_slices(other)
    assert (a.definitely_overlaps(b), b.definitely_overlaps(a)) == (overlaps, overlaps)
