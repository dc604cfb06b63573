"""Which images train, validate and test."""

import re

import numpy as np
import pytest

from topwork.data.dataset_manifest import DatasetFacts
from topwork.data.splits import Examples, check_splits, choose, missing_classes
from topwork.errors import DataError
from topwork.spec.dataset import Dataset, Splits

CLASSES = ("cat", "dog")


def _train(cats=50, dogs=50):
    return {"train": Examples(0, np.repeat([0, 1], [cats, dogs]))}


def _facts(**splits):
    return DatasetFacts(
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


THIRDS = {"train": "train[:40%]", "validation": "train[40%:50%]", "test": "train[50%:60%]"}


def test_slices_are_disjoint_parts_of_the_asked_size():
    chosen = choose(_dataset(**THIRDS), _train(), CLASSES, seed=1)
    assert {name: len(positions) for name, positions in chosen.items()} == {"train": 40, "validation": 10, "test": 10}
    assert len(np.unique(np.concatenate(list(chosen.values())))) == 60


def test_a_dataset_stored_class_by_class_gives_mixed_slices():
    chosen = choose(_dataset(**THIRDS), _train(), CLASSES, seed=1)
    dogs = {name: int((positions >= 50).sum()) for name, positions in chosen.items()}
    assert 10 <= dogs["train"] <= 30
    assert 0 < dogs["validation"] < 10


def test_slices_depend_on_the_seed_alone():
    one, again, other = (choose(_dataset(**THIRDS), _train(), CLASSES, seed=seed) for seed in (1, 1, 2))
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
def test_the_slicing_of_tfds_is_understood(train, size):
    labels = np.array([0, 1] * 9)
    sources = {"train": Examples(0, labels[:11]), "test": Examples(11, labels[11:])}
    for seed in range(100):  # some seed gives both classes
        try:
            chosen = choose(_dataset("allow", train=train, test="test[6:]"), sources, CLASSES, seed)
        except DataError:
            continue
        assert len(chosen["train"]) == size
        return
    assert size == 1


def test_complementary_slices_cover_a_split_of_any_size():
    for size in range(4, 60):
        sources = {"train": Examples(0, np.arange(size) % 2)}
        try:
            chosen = choose(
                _dataset("allow", train="train[:70%]", validation="train[70%:90%]", test="train[-10%:]"),
                sources,
                CLASSES,
                3,
            )
        except DataError as error:
            assert "holds no image" in str(error) and size < 10
            continue
        assert sorted(np.concatenate(list(chosen.values())).tolist()) == list(range(size))


def test_counts_are_exact_for_each_class():
    sources = {"test": Examples(0, np.repeat([0, 1], [5, 30])), "train": Examples(35, np.repeat([0, 1], [40, 20]))}
    labels = np.concatenate([examples.labels for examples in sources.values()])
    chosen = choose(_dataset(perClass={"train": 20, "validation": 5, "test": 10}), sources, CLASSES, seed=1)
    assert {name: np.bincount(labels[positions]).tolist() for name, positions in chosen.items()} == {
        "train": [20, 20],
        "validation": [5, 5],
        "test": [10, 10],
    }
    assert len(np.unique(np.concatenate(list(chosen.values())))) == 70


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"perClass": {"train": 30, "test": 10}},
            "spec.dataset.splits.perClass asks for 40 images of each class (train 30, validation 0, test 10), but dog "
            "has 20. Ask for fewer.",
        ),
        (
            {"train": "train", "test": "validation[:10%]"},
            "spec.dataset.splits.test is validation[:10%], but the dataset has no split validation. It has train (70 "
            "images).",
        ),
        ({"train": "train[:100]"}, "spec.dataset.splits.train: train[:100] reaches beyond the 70 images of train."),
        ({"train": "train[-71:]"}, "spec.dataset.splits.train: train[-71:] reaches beyond the 70 images of train."),
        (
            {"train": "train", "validation": "train[60:-15]"},
            "spec.dataset.splits.validation: train[60:-15] holds no image: train has 70 images. Widen the slice.",
        ),
    ],
)
def test_splits_that_a_dataset_cannot_fill_are_refused_by_its_counts(splits, message):
    with pytest.raises(DataError, match=re.escape(message)):
        check_splits(Splits.model_construct(**_constructed(splits)), _facts(train=(50, 20)))


def _constructed(splits):
    """Splits without the rules of the spec, which does not know the size of a dataset."""
    from topwork.spec.dataset import PerClass

    empty = {"train": None, "validation": None, "test": None, "per_class": None}
    if "perClass" in splits:
        return {**empty, "per_class": PerClass.model_validate(splits["perClass"])}
    return {**empty, **splits}


def test_a_class_without_training_images_is_refused():
    with pytest.raises(DataError, match=r"The training split holds no image of dog\. Enlarge"):
        choose(
            _dataset("allow", train="train[:1]", test="train[1:]"),
            {"train": Examples(0, np.array([0] * 50))},
            CLASSES,
            seed=1,
        )


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_class_that_would_never_be_measured_is_refused_unless_that_is_allowed(name):
    splits = {"train": "train[1:]", "test": "train[1:]", name: "train[:1]"}
    with pytest.raises(
        DataError,
        match=rf"The {name} split holds no image of (cat|dog)\. Enlarge .*\.{name}, .*onMissingClass: allow",
    ):
        choose(_dataset(**splits), _train(), CLASSES, seed=1)
    assert len(choose(_dataset("allow", **splits), _train(), CLASSES, seed=1)[name]) == 1


def test_missing_classes_are_named():
    assert missing_classes(np.array([0, 0]), CLASSES) == "dog"
    assert missing_classes(np.array([1, 0]), CLASSES) == ""
