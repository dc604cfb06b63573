"""Losses, accuracy and class weights, compared with their definitions."""

import keras
import numpy as np
import pytest

from topwork.data.batches import training_batches
from topwork.data.local_dataset import Split
from topwork.errors import DataError
from topwork.model.augmentation import build_augmentation
from topwork.spec.model import Augmentation
from topwork.spec.training import Loss
from topwork.training.losses import balanced_class_weights, correct_predictions, loss_targets, make_accuracy, make_loss

LOGITS3 = np.array([[2.0, -1.0, 0.5], [0.0, 0.1, -3.0]], np.float32)
ONE_HOT3 = np.eye(3, dtype=np.float32)[[0, 2]]
LOGITS2 = np.array([[1.5], [-0.3]], np.float32)
ONE_HOT2 = np.eye(2, dtype=np.float32)[[1, 1]]


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["auto", "categoricalCrossentropy", "sparseCategoricalCrossentropy"])
def test_cross_entropies_equal_those_of_the_probabilities(name):
    expected = -np.log(probabilities(LOGITS3)[[0, 1], [0, 2]]).mean()
    assert float(make_loss(name, 3)(loss_targets(ONE_HOT3), LOGITS3)) == pytest.approx(expected, rel=1e-5)
    # One logit z equals the pair of logits (0, z).
    two = probabilities(np.concatenate([np.zeros_like(LOGITS2), LOGITS2], axis=1))
    expected = -np.log(two[:, 1]).mean()
    assert float(make_loss(name, 2)(loss_targets(ONE_HOT2), LOGITS2)) == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_and_focal_loss_equal_their_definitions():
    probability = probabilities(LOGITS3)
    smooth = ONE_HOT3 * 0.8 + 0.2 / 3
    expected = -(smooth * np.log(probability)).sum(axis=1).mean()
    named = Loss(name="categoricalCrossentropy", label_smoothing=0.2)
    assert float(make_loss(named, 3)(ONE_HOT3, LOGITS3)) == pytest.approx(expected, rel=1e-5)
    true = probability[[0, 1], [0, 2]]
    expected = -((1 - true) ** 3 * np.log(true)).mean()
    assert float(make_loss(Loss(name="focal", gamma=3.0), 3)(ONE_HOT3, LOGITS3)) == pytest.approx(expected, rel=1e-4)
    true = 1 / (1 + np.exp(-LOGITS2[:, 0]))
    expected = -((1 - true) ** 2 * np.log(true)).mean()
    assert float(make_loss(Loss(name="focal"), 2)(loss_targets(ONE_HOT2), LOGITS2)) == pytest.approx(expected, rel=1e-4)


def test_binary_cross_entropy_is_rejected_for_more_than_two_classes():
    assert isinstance(make_loss("binaryCrossentropy", 2), keras.losses.BinaryCrossentropy)
    with pytest.raises(DataError) as error:
        make_loss("binaryCrossentropy", 5)
    assert str(error.value) == (
        "spec.transfer.loss is binaryCrossentropy, which is for two classes, but the dataset has 5. "
        "Use auto or categoricalCrossentropy."
    )


def test_accuracy_compares_with_the_class_that_has_the_largest_share():
    mixed = np.array([[0.6, 0.4], [0.2, 0.8]], np.float32)
    assert np.array(correct_predictions(loss_targets(mixed), np.array([[-1.0], [-1.0]], np.float32))).tolist() == [
        1.0,
        0.0,
    ]
    metric = make_accuracy()
    metric.update_state(ONE_HOT3, LOGITS3)
    assert float(metric.result()) == 0.5


def test_balanced_class_weights_make_every_class_count_equally():
    labels = np.array([0] * 6 + [1] * 2 + [2] * 4)
    weights = balanced_class_weights(labels, 3)
    assert weights.tolist() == pytest.approx([12 / 18, 2.0, 1.0])
    assert weights[labels].mean() == pytest.approx(1.0)
    with pytest.raises(DataError, match=r"classes \[3\] have none in the training split"):
        balanced_class_weights(labels, 4)


class Images(Split):
    """A split with the given labels and random pixels."""

    def __init__(self, labels):
        self.labels = np.asarray(labels, np.int64)
        self.size, self.image_size = len(self.labels), (6, 6)
        self._pixels = np.random.default_rng(0).integers(0, 256, (self.size, 6, 6, 3), np.uint8)
        self._rows = np.arange(self.size)


@pytest.mark.parametrize("augmentation", [{"mix_up": 0.4}, {"cut_mix": 1.0}, {"mix_up": 1.0, "flip": "horizontal"}])
@pytest.mark.parametrize("labels", [[0] * 20 + [1] * 4, [0] * 9 + [1] * 12 + [2] * 3], ids=["binary", "three-classes"])
def test_weight_of_a_mixed_image_is_the_mix_of_the_weights_of_its_classes(labels, augmentation):
    split, classes = Images(labels), len(set(labels))
    weights = balanced_class_weights(split.labels, classes)
    batches = training_batches(
        split, classes=classes, batch_size=8, seed=3,
        augment=build_augmentation(Augmentation(**augmentation)), class_weights=weights,
    )  # fmt: skip
    drawn = [(one_hot.numpy(), weight.numpy()) for _, one_hot, weight in batches.take(6)]
    mixed, actual = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    assert ((mixed > 0.05).sum(axis=1) > 1).any(), "labels are mixed"
    np.testing.assert_allclose(actual, mixed @ weights, rtol=1e-5)
    # Each class has the same total weight, also after mixing.
    total = sum(mixed.sum(axis=1))
    assert actual.sum() == pytest.approx(sum(mixed.sum(axis=0) * weights))
    assert total == pytest.approx(len(mixed), rel=1e-5)


def test_weight_of_an_image_without_mixing_is_exactly_that_of_its_class():
    split = Images([0] * 9 + [1] * 12 + [2] * 3)
    weights = balanced_class_weights(split.labels, 3)
    for _, one_hot, weight in training_batches(split, classes=3, batch_size=8, seed=3, class_weights=weights).take(3):
        np.testing.assert_array_equal(weight.numpy(), weights[one_hot.numpy().argmax(axis=1)])
