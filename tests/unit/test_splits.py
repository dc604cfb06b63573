"""Selection of the training, validation and test splits."""

import re

import numpy as np
import pytest

from topwork.data.dataset_manifest import DatasetMetadata
from topwork.data.splits.counts import check_splits, count_images
from topwork.data.splits.selection import SourceSplit, format_missing_classes, permutation, select_splits
from topwork.errors import DataError
from topwork.spec.dataset import Dataset
from topwork.spec.splits import Splits

CLASSES = ("cat", "dog")


def _train(cats=50, dogs=50):
    return {"train": SourceSplit(0, np.repeat([0, 1], [cats, dogs]))}


def _metadata(**splits):
    return DatasetMetadata(
        name="pets",
        fingerprint="0" * 16,
        source={},
        class_names=CLASSES,
        splits={split: dict(zip(CLASSES, counts, strict=True)) for split, counts in splits.items()},
        images=sum(map(sum, splits.values())),
        rejected=(),
        duplicates=0,
    )


def _splits(**splits):
    return Splits.model_validate(splits)


def _dataset(on_missing_class="fail", **splits):
    return Dataset.model_validate(
        {
            "source": {"tfds": "pets"},
            "splits": splits,
            "imageSize": [32, 32],
            "onMissingClass": on_missing_class,
        }
    )


SLICES = {"train": "train[:40%]", "validation": "train[40%:50%]", "test": "train[50%:60%]"}


def test_select_splits_returns_disjoint_slices_of_the_requested_size():
    selected = select_splits(_dataset(**SLICES), _train(), CLASSES, seed=1)
    assert {name: len(positions) for name, positions in selected.items()} == {"train": 40, "validation": 10, "test": 10}
    assert len(np.unique(np.concatenate(list(selected.values())))) == 60


def test_select_splits_mixes_classes_of_a_dataset_stored_class_by_class():
    selected = select_splits(_dataset(**SLICES), _train(), CLASSES, seed=1)
    dogs = {name: int((positions >= 50).sum()) for name, positions in selected.items()}
    assert 10 <= dogs["train"] <= 30
    assert 0 < dogs["validation"] < 10


def test_select_splits_is_deterministic_for_a_seed():
    one, again, other = (select_splits(_dataset(**SLICES), _train(), CLASSES, seed=seed) for seed in (1, 1, 2))
    assert all((one[name] == again[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize(
    ("train", "size"),
    [
        ("train", 11),
        ("train[:40%]", 4),
        ("train[-10%:]", 1),
        ("train[2:7]", 5),
        ("train[-3:]", 3),
        ("train[:50%]+test", 6 + 7),
        ("train[:2]+train[5:6]+test[:1]", 4),
    ],
)
def test_select_splits_accepts_tfds_slicing(train, size):
    labels = np.array([0, 1] * 9)
    sources = {"train": SourceSplit(0, labels[:11]), "test": SourceSplit(11, labels[11:])}
    for seed in range(100):  # at least one seed selects both classes
        try:
            selected = select_splits(_dataset("allow", train=train, test="test[6:]"), sources, CLASSES, seed)
        except DataError:
            continue
        assert len(selected["train"]) == size
        return
    assert size == 1


def test_select_splits_covers_a_split_of_any_size_with_complementary_slices():
    for size in range(4, 60):
        sources = {"train": SourceSplit(0, np.arange(size) % 2)}
        try:
            selected = select_splits(
                _dataset("allow", train="train[:70%]", validation="train[70%:90%]", test="train[-10%:]"),
                sources,
                CLASSES,
                3,
            )
        except DataError as error:
            assert "is empty" in str(error) and size < 10
            continue
        assert sorted(np.concatenate(list(selected.values())).tolist()) == list(range(size))


def test_counts_per_class_select_the_first_images_of_each_class_of_one_permutation():
    random = np.random.default_rng(2)
    labels = random.permutation(np.repeat(np.arange(150), random.integers(9, 14, 150)))
    sources = {"train": SourceSplit(0, labels[:900]), "test": SourceSplit(900, labels[900:])}
    names = tuple(f"class {index}" for index in range(150))
    requested = {"train": 5, "validation": 1, "test": 3}
    selected = select_splits(_dataset(perClass=requested), sources, names, seed=3)
    order, start = permutation(len(labels), 3), 0
    for name, count in requested.items():
        expected = [order[labels[order] == label][start : start + count] for label in range(150)]
        np.testing.assert_array_equal(selected[name], np.concatenate(expected))
        start += count


def test_select_splits_returns_exact_counts_per_class():
    sources = {
        "test": SourceSplit(0, np.repeat([0, 1], [5, 30])),
        "train": SourceSplit(35, np.repeat([0, 1], [40, 20])),
    }
    labels = np.concatenate([examples.labels for examples in sources.values()])
    selected = select_splits(_dataset(perClass={"train": 20, "validation": 5, "test": 10}), sources, CLASSES, seed=1)
    assert {name: np.bincount(labels[positions]).tolist() for name, positions in selected.items()} == {
        "train": [20, 20],
        "validation": [5, 5],
        "test": [10, 10],
    }
    assert len(np.unique(np.concatenate(list(selected.values())))) == 70


FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def test_fractions_divide_every_class_for_every_seed():
    sources = {"train": SourceSplit(0, np.repeat(np.arange(10), 20))}
    names = tuple(map(str, range(10)))
    for seed in range(20):
        selected = select_splits(_dataset(**FRACTIONS), sources, names, seed)
        labels = {
            name: np.bincount(sources["train"].labels[positions]).tolist() for name, positions in selected.items()
        }
        assert labels == {"train": [16] * 10, "validation": [2] * 10, "test": [2] * 10}


def test_fractions_use_all_source_splits_and_depend_only_on_the_seed():
    sources = {
        "test": SourceSplit(0, np.repeat([0, 1], [5, 30])),
        "train": SourceSplit(35, np.repeat([0, 1], [15, 30])),
    }
    one, again, other = (select_splits(_dataset(**FRACTIONS), sources, CLASSES, seed) for seed in (1, 1, 2))
    assert sorted(np.concatenate(list(one.values()))) == list(range(80))
    assert all((one[name] == again[name]).all() for name in FRACTIONS)
    assert any((one[name] != other[name]).any() for name in FRACTIONS)


def test_fractions_without_stratification_ignore_the_classes():
    dogs = set()
    for seed in range(10):
        selected = select_splits(_dataset(**FRACTIONS, stratify=False), _train(), CLASSES, seed)
        assert {name: len(positions) for name, positions in selected.items()} == {
            "train": 80,
            "validation": 10,
            "test": 10,
        }
        dogs.add(int((selected["train"] >= 50).sum()))
    assert len(dogs) > 1


def test_fractions_reject_a_class_with_fewer_images_than_splits():
    message = "divides each class into 3 splits, but dog has fewer than 3 images."
    with pytest.raises(DataError, match=re.escape(message)):
        select_splits(_dataset(**FRACTIONS), _train(dogs=2), CLASSES, seed=1)
    with pytest.raises(DataError, match=re.escape(message)):
        check_splits(_dataset(**FRACTIONS), _metadata(train=(50, 2)))
    selected = select_splits(_dataset("allow", **FRACTIONS), _train(dogs=2), CLASSES, seed=1)
    assert len(np.unique(np.concatenate(list(selected.values())))) == 52


def test_number_of_images_is_known_before_the_pull():
    splits = _splits(**FRACTIONS)
    assert count_images(splits, {"train": 1005}, None) == {"train": 804, "validation": 101, "test": 100}
    assert count_images(splits, {}, 2) == {"train": None, "validation": None, "test": None}
    assert count_images(splits, {"train": 9}, 3, {"a": 3, "b": 3, "c": 3}) == {"train": 3, "validation": 3, "test": 3}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"perClass": {"train": 30, "test": 10}},
            "spec.dataset.splits.perClass requests 40 images per class (train 30, validation 0, test 10), but dog "
            "has 20. Request fewer.",
        ),
        (
            {"train": "train", "test": "validation[:10%]"},
            "spec.dataset.splits.test is validation[:10%], but the dataset has no split validation. It has train (70 "
            "images).",
        ),
        ({"train": "train[:100]"}, "spec.dataset.splits.train: train[:100] is out of range: train has 70 images."),
        ({"train": "train[-71:]"}, "spec.dataset.splits.train: train[-71:] is out of range: train has 70 images."),
        (
            {"train": "train", "validation": "train[60:-15]"},
            "spec.dataset.splits.validation: train[60:-15] is empty: train has 70 images. Widen the slice.",
        ),
    ],
)
def test_check_splits_rejects_splits_that_a_dataset_cannot_fill(splits, message):
    with pytest.raises(DataError, match=re.escape(message)):
        check_splits(_unvalidated_dataset(splits), _metadata(train=(50, 20)))


def _unvalidated_dataset(splits):
    """A dataset whose splits the spec does not validate."""
    from topwork.spec.splits import PerClass

    if "perClass" in splits:
        splits = {"per_class": PerClass.model_validate(splits["perClass"])}
    return Dataset.model_construct(splits=Splits.model_construct(**splits))


def test_select_splits_rejects_a_class_without_training_images():
    with pytest.raises(DataError, match=r"The training split contains no image of dog\. Enlarge"):
        select_splits(
            _dataset("allow", train="train[:1]", test="train[1:]"),
            {"train": SourceSplit(0, np.array([0] * 50))},
            CLASSES,
            seed=1,
        )


@pytest.mark.parametrize("name", ["validation", "test"])
def test_select_splits_rejects_a_class_without_evaluation_images_unless_allowed(name):
    splits = {"train": "train[1:]", "test": "train[1:]", name: "train[:1]"}
    with pytest.raises(
        DataError,
        match=rf"The {name} split contains no image of (cat|dog)\. Enlarge .*\.{name}, .*onMissingClass: allow",
    ):
        select_splits(_dataset(**splits), _train(), CLASSES, seed=1)
    assert len(select_splits(_dataset("allow", **splits), _train(), CLASSES, seed=1)[name]) == 1


def test_format_missing_classes_names_the_missing_classes():
    assert format_missing_classes(np.array([0, 0]), CLASSES) == "dog"
    assert format_missing_classes(np.array([1, 0]), CLASSES) == ""
