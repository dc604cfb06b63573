"""Folds of cross-validation: every image is tested once, and the folds have the same size and classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topwork.data.splits.counts import count_images
from topwork.data.splits.groups import Groups
from topwork.data.splits.selection import SourceSplit, select_splits
from topwork.data.splits.stratification import allocate
from topwork.errors import DataError
from topwork.spec.dataset import Dataset
from topwork.spec.splits import Splits

FOLDS = st.integers(2, 6)
CLASS_SIZES = st.lists(st.integers(12, 60), min_size=2, max_size=5)


def select(labels, fold, groups=None, on_missing_class="fail", seed=1, **splits):
    names = tuple(f"class-{label}" for label in range(labels.max() + 1))
    dataset = Dataset.model_construct(splits=Splits(fold=fold, **splits), on_missing_class=on_missing_class)
    return select_splits(
        dataset,
        {"train": SourceSplit(0, labels)},
        names,
        seed,
        None if groups is None else Groups.of([str(group) for group in groups]),
    )


@settings(deadline=None)
@given(CLASS_SIZES, FOLDS, st.sampled_from([None, 0.1, 0.2]), st.integers(0, 3))
def test_every_image_is_tested_once_and_classes_are_divided_evenly(class_sizes, folds, validation, seed):
    labels = np.repeat(np.arange(len(class_sizes)), class_sizes)
    tested = []
    for fold in range(1, folds + 1):
        selected = select(labels, fold, folds=folds, validation=validation, seed=seed)
        assert sorted(np.concatenate(list(selected.values()))) == list(range(len(labels)))
        sizes = {name: len(positions) for name, positions in selected.items()}
        assert sizes == count_images(
            Splits(folds=folds, fold=fold, validation=validation),
            {"train": len(labels)},
            len(class_sizes),
            dict(enumerate(class_sizes)),
        )
        assert abs(sizes["test"] - len(labels) / folds) <= 1
        # Small classes have an image in each split, which can be more than their share.
        extra = sum(validation is not None and size * validation < 2 for size in class_sizes)
        assert abs(sizes.get("validation", 0) - len(labels) * (validation or 0)) <= 1 + extra
        of_class = np.bincount(labels[selected["test"]], minlength=len(class_sizes))
        assert (abs(of_class - np.array(class_sizes) / folds) < 2).all()
        tested.append(selected["test"])
    assert sorted(np.concatenate(tested)) == list(range(len(labels)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 25), min_size=80, max_size=150), st.integers(0, 3))
def test_groups_are_never_divided(groups, seed):
    groups = np.unique(groups, return_inverse=True)[1]
    labels = np.arange(len(groups)) % 2
    try:
        folds = [
            select(labels, fold, groups, "allow", seed, folds=3, validation=0.2, stratify=False) for fold in (1, 2, 3)
        ]
    except DataError as error:
        assert "groups" in str(error) or "no image of" in str(error)
        return
    for selected in folds:
        parts = [set(groups[positions]) for positions in selected.values()]
        assert sum(map(len, parts)) == len(set.union(*parts)) == groups.max() + 1
    assert sorted(np.concatenate([selected["test"] for selected in folds])) == list(range(len(groups)))


def test_folds_depend_on_the_seed_only():
    labels = np.repeat([0, 1], [40, 30])
    first, again, other = (select(labels, 2, folds=5, seed=seed)["test"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(np.sort(first), np.sort(other))


def test_final_model_trains_on_all_images_but_the_fraction_for_validation():
    labels = np.repeat([0, 1], [50, 50])
    assert {name: len(part) for name, part in select(labels, None, folds=5).items()} == {"train": 100}
    with_validation = select(labels, None, folds=5, validation=0.1)
    assert {name: len(part) for name, part in with_validation.items()} == {"train": 90, "validation": 10}


def test_class_with_fewer_images_than_folds_is_named():
    labels = np.repeat([0, 1], [50, 4])
    with pytest.raises(DataError, match="divides each class into 5 splits, but class-1 has fewer than 5 images"):
        select(labels, 1, folds=5)
    assert len(select(labels, 1, folds=5, on_missing_class="allow")["test"]) == 11


def test_first_fold_fails_if_a_later_one_would():
    # All images of class 1 are in one group, so no other fold can test it, and that fold cannot train it.
    labels = np.repeat([0, 1], [60, 20])
    groups = np.concatenate([np.arange(60) // 6, np.full(20, 10)])
    for fold in (1, 2, 3):
        with pytest.raises(
            DataError, match=r"no image of class-1\. Use smaller groups or fewer spec\.dataset\.splits\.f"
        ):
            select(labels, fold, groups, "allow", folds=3, group_by="folder")


def test_fold_without_groups_is_named():
    labels = np.repeat([0, 1], [20, 20])
    with pytest.raises(
        DataError, match=r"The fold [0-9] test split has no images: .* finds only 4 groups.* fewer folds"
    ):
        select(labels, 1, np.arange(40) // 10, "allow", folds=5)


def test_fold_that_is_not_stratified_lacks_a_class():
    with pytest.raises(
        DataError, match=r"The test split contains no image of class-1\. Set stratify: true, remove the "
    ):
        select(np.repeat([0, 1], [60, 3]), 1, folds=5, stratify=False)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([[0.8, 0.1, 0.1], [0.9, 0.1], [0.5, 0.5]]))
def test_fractions_that_add_up_to_one_use_every_image(class_sizes, fractions):
    assert allocate(class_sizes, fractions).sum(axis=1).tolist() == class_sizes
