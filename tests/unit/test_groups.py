"""Groups of images are never divided among splits."""

import gzip

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topwork.data.splits.groups import Groups, assign_groups, find_groups
from topwork.data.splits.selection import SourceSplit, select_splits
from topwork.errors import DataError
from topwork.spec.dataset import Dataset
from topwork.spec.splits import GroupColumn, GroupRegex

CLASSES = ("healthy", "ill")
FRACTIONS = [0.7, 0.1, 0.2]
# The class and the group of each image.
IMAGES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=300)


def dataset(group_by="folder", **settings):
    splits = {"train": 0.7, "validation": 0.1, "test": 0.2, "groupBy": group_by}
    source = {"table": {"uri": "images.csv"}} if isinstance(group_by, dict) else {"folder": {"uri": "photos"}}
    return Dataset.model_validate({"source": source, "splits": splits, "imageSize": [32, 32], **settings})


@given(IMAGES, st.sampled_from([FRACTIONS, [0.5, 0.2], [0.9, 0.1]]), st.integers(0, 3))
def test_every_group_is_in_one_split(images, fractions, seed):
    strata, groups = (np.array(column) for column in zip(*images, strict=True))
    groups = np.unique(groups, return_inverse=True)[1]
    split = assign_groups(strata, groups, fractions, seed)
    assert all(len(np.unique(split[groups == group])) == 1 for group in np.unique(groups))
    assert split.min() >= 0
    assert split.max() <= (len(fractions) if sum(fractions) < 0.99 else len(fractions) - 1)
    assert (split == assign_groups(strata, groups, fractions, seed)).all()


def test_classes_are_divided_by_the_fractions_as_far_as_groups_allow():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(300), random.integers(1, 12, 300))
    strata = (random.random(len(groups)) < random.choice([0.05, 0.6], 300)[groups]).astype(np.int64)
    split = assign_groups(strata, groups, FRACTIONS, seed=0)
    counts = np.array([np.bincount(strata[split == index], minlength=2) for index in range(3)])
    np.testing.assert_allclose(counts / np.bincount(strata), np.outer(FRACTIONS, [1, 1]), atol=0.01)


def test_groups_of_the_same_size_are_assigned_by_the_seed():
    strata, groups = np.zeros(100, np.int64), np.repeat(np.arange(50), 2)
    one, other = (assign_groups(strata, groups, FRACTIONS, seed) for seed in (0, 1))
    assert (one != other).any()


def test_splits_of_a_job_contain_whole_groups():
    random = np.random.default_rng(0)
    labels, groups = random.integers(0, 2, 400), random.integers(0, 40, 400)
    sources = {"test": SourceSplit(0, labels[:100]), "train": SourceSplit(100, labels[100:])}
    selected = select_splits(dataset(), sources, CLASSES, seed=1, groups=Groups(range(40), groups))
    assert sorted(np.concatenate(list(selected.values()))) == list(range(400))
    found = [set(groups[positions]) for positions in selected.values()]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_too_few_groups_are_rejected():
    sources = {"train": SourceSplit(0, np.array([0, 1] * 20))}
    with pytest.raises(DataError, match=r"validation split has no images: .* finds only 2 groups"):
        select_splits(dataset(), sources, CLASSES, seed=1, groups=Groups(["a", "b"], np.arange(40) // 20))


def write_listing(path, groups):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{name},ill,10,etag,,{group}\n" for name, group in groups.items())
    return path


NAMES = ["ill/p1/1.png", "healthy/p1/2.png", "ill/p2/3.png", "ill/p2/more/4.png"]


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        ("folder", [1, 1, 2, 0]),
        (GroupRegex(regex=r"(p\d)/"), [0, 0, 1, 1]),
        (GroupRegex(regex=r"\d\.png$"), [0, 1, 2, 3]),
        (GroupColumn(column="patient"), [1, 1, 0, 0]),
    ],
)
def test_groups_are_found_by_folder_name_and_column(group_by, expected, tmp_path):
    listing = write_listing(tmp_path / "entries.csv.gz", dict(zip(NAMES, ["b", "b", "a", "a"], strict=True)))
    assert find_groups(group_by, NAMES, CLASSES, listing).of_image.tolist() == expected


@pytest.mark.parametrize(
    ("group_by", "names", "message"),
    [
        ("folder", ["ill/1.png", "healthy/2.png"], "directly in the directories of their classes"),
        ("folder", ["1.png", "2.png"], "directly in the directories of their classes"),
        (GroupRegex(regex=r"(p\d)/"), ["ill/p1/1.png", "ill/x/2.png"], r"finds no group in 1 of 2 .* ill/x/2\.png"),
        (GroupRegex(regex=r"ill(p\d)?"), ["ill/p1/1.png"], "finds no group in 1 of 1"),
        (GroupColumn(column="patient"), ["a.png", "b.png", "c.png"], r"patient .* is empty for 2 images, .* b\.png, c"),
    ],
)
def test_images_without_a_group_are_rejected(group_by, names, message, tmp_path):
    listing = write_listing(tmp_path / "entries.csv.gz", {"a.png": "1", "b.png": ""})
    with pytest.raises(DataError, match=message):
        find_groups(group_by, names, CLASSES, listing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_by": {"regex": "("}}, "is not a regular expression"),
        (
            {"group_by": {"column": "patient"}, "source": {"folder": {"uri": "photos"}}},
            "needs spec.dataset.source.table",
        ),
        ({"splits": {"train": "train[:80%]", "test": "train[80%:]", "groupBy": "folder"}}, "applies only to fractions"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        dataset(**settings)
