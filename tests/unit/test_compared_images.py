"""The images on which models are compared."""

from types import SimpleNamespace

import numpy as np
import pytest

from topwork.data.local_dataset import LocalDataset
from topwork.errors import DataError
from topwork.report.comparison.images import select_compared_images


class FakeSplit:
    def __init__(self, digests, labels=None):
        self.digests = np.array(digests, np.uint64)
        self.size = len(digests)
        self.labels = np.array(labels or [0] * self.size)

    def subset(self, indices):
        return FakeSplit(self.digests[indices], self.labels[indices].tolist())


def model(name, *, train, validation=None, test=None, classes=("cat", "dog"), dataset="0a", trial=False):
    """A candidate and its splits; a split is a mapping from pixel digest to label."""
    splits = [images and FakeSplit([*images], [*images.values()]) for images in (train, validation, test)]
    stored = {**train, **(validation or {}), **(test or {})}
    records = SimpleNamespace(digests=np.array([*stored], np.uint64), labels=np.array([*stored.values()]))
    candidate = SimpleNamespace(name=name, is_trial=trial, dataset=SimpleNamespace(prefix=dataset))
    return candidate, LocalDataset(classes, *splits, records=records)


def select(*models):
    candidates, splits = zip(*models, strict=True)
    return select_compared_images(candidates, splits)


def test_models_with_the_same_splits_are_compared_on_all_test_images():
    splits = {"train": {1: 0}, "validation": {2: 0}, "test": {3: 0, 4: 1}}
    selected = select(model("cats/1", **splits), model("cats/2", **splits))
    assert (selected.split, selected.images.digests.tolist()) == ("test", [3, 4])
    assert (selected.described, selected.notes) == ("2 images of the test split of cats/1", ())


def test_images_of_train_and_validation_of_any_model_are_left_out():
    selected = select(
        model("cats/1", train={1: 0, 9: 0}, validation={2: 0}, test={3: 0, 4: 1, 5: 0, 6: 1, 9: 0}),
        model("cats/2", train={3: 0}, validation={4: 1}, test={5: 0, 2: 0}),
    )
    assert selected.images.digests.tolist() == [5, 6]
    assert selected.notes == (
        "Of 5 images, 1 because of cats/1 and 2 because of cats/2 are left out: it was trained on them or selected "
        "with them.",
    )


def test_models_without_common_images_are_refused():
    with pytest.raises(DataError) as raised:
        select(model("cats/1", train={1: 0}, test={2: 0}), model("cats/2", train={2: 0}, test={1: 0}))
    assert str(raised.value) == (
        "No image of the test split of cats/1 is left to compare on: 1 because of cats/2 cannot be used, because it "
        "was trained on them or selected with them. Compare models of the same splits (spec.dataset.splits, "
        "spec.seed), or keep the test set with pinTest."
    )


def test_first_model_needs_a_split_to_compare_on():
    splits = {"train": {1: 0}}
    with pytest.raises(DataError, match=r"^cats/1 has no validation split, so there are no images to compare"):
        select(model("cats/1", **splits), model("cats/2", **splits))


def test_models_without_a_test_split_are_compared_on_common_validation_images():
    selected = select(
        model("cats/1", train={1: 0}, validation={2: 0, 3: 0, 4: 0}),
        model("cats/2", train={1: 0, 4: 0}, validation={3: 0, 4: 0}, test={2: 0}),
    )
    assert (selected.split, selected.images.digests.tolist()) == ("validation", [3])
    assert [note.split(",")[0] for note in selected.notes] == [
        "The validation split also selected the best epoch of each model",
        "Of 3 images",
    ]


@pytest.mark.parametrize(
    ("trials", "names"), [((True, True), "a-1 and b-1 never publish,"), ((False, True), "b-1 never publishes,")]
)
def test_trials_of_a_search_do_not_use_the_test_split(trials, names):
    splits = {"train": {1: 0}, "validation": {2: 0}, "test": {3: 0}}
    selected = select(model("a-1", trial=trials[0], **splits), model("b-1", trial=trials[1], **splits))
    assert (selected.split, selected.images.digests.tolist()) == ("validation", [2])
    assert selected.notes[0].startswith(f"{names} as the trials of a search")


def test_images_with_another_class_in_another_dataset_are_reported():
    first = model("cats/1", train={1: 0}, test={2: 0, 3: 1, 4: 1})
    other = model("cats/2", train={1: 0}, test={2: 1, 3: 0, 4: 1}, classes=("dog", "cat"), dataset="0b")
    selected = select(first, other)
    assert selected.images.digests.tolist() == [2, 3, 4]
    assert selected.notes == ("1 image has another class in the dataset of cats/2; the classes are those of cats/1.",)
