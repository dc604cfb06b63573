"""A pinned test set: the same images by their pixels, while the dataset grows."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.splits.counts import count_images
from topwork.data.splits.groups import Groups
from topwork.data.splits.inputs import EvaluatedImage, PinnedTest, SplitInputs
from topwork.data.splits.pinned_test import select_pinned_test
from topwork.data.splits.selection import SourceSplit, StoredImages, select_images
from topwork.errors import DataError
from topwork.spec.dataset import Dataset

CLASSES = ("cat", "dog")


def dataset(on_missing_class="fail", **splits):
    return Dataset.model_validate(
        {
            "source": {"folder": {"uri": "pets"}},
            "splits": {"train": 0.8, "validation": 0.2, "pinTest": 3} | splits,
            "imageSize": [32, 32],
            "onMissingClass": on_missing_class,
        }
    )


def stored_images(rows, groups=None):
    """Images from rows of pixel digest, label and name."""
    digests, labels, names = zip(*rows, strict=True)
    sources = {"train": SourceSplit(0, np.array(labels))}
    return StoredImages(CLASSES, sources, names, np.array(digests, np.uint64), groups)


def pinned_test(rows, version=3):
    return PinnedTest(
        version, tuple(EvaluatedImage(f"{digest:016x}", CLASSES[label], name) for digest, label, name in rows)
    )


def metadata():
    return DatasetMetadata(
        name="pets", fingerprint="0" * 16, source={"folder": {"uri": "pets"}}, class_names=CLASSES, splits={}, images=0,
        rejected=(), duplicates=0,
    )  # fmt: skip


def select(rows, pinned, seed=1, groups=None, **splits):
    images = stored_images(rows, groups)
    return select_images(dataset("allow", **splits), metadata(), images, SplitInputs(pinned=pinned_test(pinned)), seed)


# Pixels and class: equal pixels always have the same class here.
PIXELS = st.lists(st.integers(0, 25), min_size=1, max_size=40)


@settings(deadline=None)
@given(
    before=PIXELS, added=PIXELS, chosen=st.sets(st.integers(0, 39), min_size=1), seed=st.integers(0, 3), data=st.data()
)
def test_test_set_has_the_same_images_while_the_dataset_grows(before, added, chosen, seed, data):
    old = [(pixels, pixels % 2, f"old/{number}.png") for number, pixels in enumerate(before)]
    test = [old[number] for number in sorted(chosen) if number < len(old)]
    renamed = [(pixels, label, name.replace("old", "new") if pixels % 3 else name) for pixels, label, name in old]
    rows = data.draw(st.permutations([*renamed, *((pixels, pixels % 2, f"add/{n}") for n, pixels in enumerate(added))]))
    groups = data.draw(st.none() | st.just(Groups.of([f"p{digest % 7}" for digest, _, _ in rows])))
    try:
        found = select(rows, test, seed, groups, **({"groupBy": "folder"} if groups else {}))
    except DataError as error:
        assert re.search("training split contains no image|All images belong|has no images", str(error))
        return
    positions = found.positions
    # The same pixels, each as often as before.
    assert sorted(rows[position][0] for position in positions["test"]) == sorted(pixels for pixels, _, _ in test)
    used = np.concatenate(list(positions.values())).tolist()
    assert len(set(used)) == len(used)
    others = [position for name in ("train", "validation") for position in positions[name]]
    held_out = {pixels for pixels, _, _ in test}
    assert not held_out & {rows[position][0] for position in others}
    if groups is None:
        assert len(others) == sum(pixels not in held_out for pixels, _, _ in rows)
    else:
        parts = [set(groups.of_image[positions[name]]) for name in ("train", "validation", "test")]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    again = select(rows, test, seed, groups, **({"groupBy": "folder"} if groups else {}))
    assert all((positions[name] == again.positions[name]).all() for name in positions)


ROWS = [(number, number % 2, f"{CLASSES[number % 2]}/{number}.png") for number in range(40)]


def test_other_images_are_divided_by_the_fractions_of_each_class():
    found = select(ROWS, ROWS[:10])
    labels = np.array([label for _, label, _ in ROWS])
    assert {name: np.bincount(labels[positions]).tolist() for name, positions in found.positions.items()} == {
        "train": [12, 12],
        "validation": [3, 3],
        "test": [5, 5],
    }
    assert found.notes == ("The test split is the test set of version 3 (10 images).",)
    other = select(ROWS, ROWS[:10], seed=2)
    assert set(other.positions["train"]) != set(found.positions["train"])
    inputs = SplitInputs(pinned=pinned_test(ROWS[:10]))
    counts = {"cat": 20, "dog": 20}
    expected = {name: len(positions) for name, positions in found.positions.items()}
    assert count_images(dataset().split_settings, {"train": 40}, 2, counts, inputs) == expected
    unknown = count_images(dataset().split_settings, {"train": 40}, 2, counts, None)
    assert unknown == {"train": None, "validation": None, "test": None}


def test_copies_and_groups_of_test_images_are_not_used_and_reported():
    copies = [(0, 0, "cat/copy.png"), (1, 1, "dog/copy.png")]
    groups = Groups.of([*(f"p{number // 2}" for number in range(40)), "p30", "p30"])
    found = select([*ROWS, *copies], [ROWS[0], ROWS[1], ROWS[2]], groups=groups, groupBy="folder")
    assert found.positions["test"].tolist() == [0, 1, 2]
    assert found.notes == (
        "The test split is the test set of version 3 (3 images).",
        "Not used: 2 images with the same pixels as an image of the test set.",
        "Not used: 1 image in a group of the test set.",
    )
    assert sorted(np.concatenate(list(found.positions.values()))) == [0, 1, 2, *range(4, 40)]


def test_of_images_with_the_same_pixels_that_with_the_same_name_is_in_the_test_set():
    rows = [(7, 0, "cat/a.png"), (7, 0, "cat/b.png"), (7, 0, "cat/c.png"), *ROWS[8:]]
    wanted = [(7, 0, "cat/gone.png"), (7, 0, "cat/c.png")]
    found = select_pinned_test(
        pinned_test(wanted), np.array([row[0] for row in rows], np.uint64), ["cat"] * 35, [row[2] for row in rows], None
    )
    assert found.test.tolist() == [0, 2]
    assert 1 not in found.others


def test_missing_and_relabeled_test_images_are_rejected():
    rows = [*ROWS[3:10], (10, 1, "dog/10.png"), *ROWS[11:]]
    message = (
        "spec.dataset.splits.pinTest is 3, but the dataset no longer has the test set of that version. 3 of 12 images "
        "are missing: cat/0.png (cat), dog/1.png (dog), cat/2.png (cat); 1 of 12 images have another class: cat/10.png "
        "(cat, now dog). Metrics of different images cannot be compared. Restore the images and their classes in the "
        "source and in spec.dataset.classes,"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        select(rows, ROWS[:12])
    with pytest.raises(DataError, match=r"12 of 12 images are missing: (.*, ){5}and 7 more\. Metrics"):
        select(ROWS[20:], ROWS[:12])


def test_one_of_two_copies_in_the_test_set_that_is_missing_is_rejected():
    with pytest.raises(DataError, match=r"1 of 2 images are missing: cat/copy\.png \(cat\)"):
        select(ROWS, [ROWS[0], (0, 0, "cat/copy.png")])


def test_new_class_without_test_images_is_rejected_unless_allowed():
    test = [row for row in ROWS[:10] if row[1] == 0]
    with pytest.raises(
        DataError, match=r"test split contains no image of dog\. Use a new test split instead of pinTest"
    ):
        select_images(dataset(), metadata(), stored_images(ROWS), SplitInputs(pinned=pinned_test(test)), seed=1)
    assert len(select(ROWS, test).positions["test"]) == 5


def test_inputs_that_were_not_read_are_never_ignored():
    with pytest.raises(ValueError, match="not read"):
        select_images(dataset(), metadata(), stored_images(ROWS), SplitInputs(), seed=1)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 0.8, "test": 0.1, "pinTest": 3}, "pinTest: 3 cannot be combined with test: the test split is that"),
        ({"train": "train[:80%]", "validation": "train[80%:]", "pinTest": 3}, "pinTest: 3 needs fractions"),
        ({"perClass": {"train": 5, "test": 5}, "pinTest": 3}, "pinTest: 3 needs fractions"),
        ({"predefined": True, "pinTest": 3}, "pinTest: 3 needs fractions"),
        ({"train": {"list": "a"}, "validation": {"list": "b"}, "pinTest": 3}, "pinTest: 3 needs fractions"),
        ({"pinTest": 3}, "train: is required"),
        ({"train": 0.8, "pinTest": 0}, "greater than or equal to 1"),
    ],
)
def test_invalid_settings_are_rejected(splits, message):
    with pytest.raises(ValueError, match=message):
        Dataset.model_validate({"source": {"tfds": "pets"}, "splits": splits, "imageSize": [32, 32]})


def test_pinned_test_set_needs_no_validation_split():
    settings = {"source": {"tfds": "pets"}, "splits": {"train": 0.8, "pinTest": 3}, "imageSize": [32, 32]}
    assert not Dataset.model_validate(settings).has_validation
