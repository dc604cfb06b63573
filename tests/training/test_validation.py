"""Validation has the same accuracy and AUC as the evaluation of the published model, also where logits saturate."""

import keras
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from topwork.data.local_dataset import Split
from topwork.errors import DataError
from topwork.model.export import add_probabilities
from topwork.model.probabilities import roc_auc
from topwork.report.evaluation import evaluate_predictions
from topwork.training import validation as validation_module
from topwork.training.losses import make_loss
from topwork.training.validation import Validation


class Pixels(Split):
    """A split whose images are random pixels."""

    def __init__(self, labels):
        self.labels = np.asarray(labels, np.int64)
        self.size, self.image_size = len(self.labels), (2, 2)
        self.names = [f"{index}.png" for index in range(self.size)]
        self._pixels = np.random.default_rng(3).integers(0, 256, (self.size, 2, 2, 3), np.uint8)
        self._rows = np.arange(self.size)


def make_classifier(classes, scale):
    keras.utils.set_random_seed(5)
    image = keras.Input((2, 2, 3), name="image")
    pixels = keras.layers.Rescaling(scale / 255, offset=-scale / 2, name="input_scaling")(image)
    logits = keras.layers.Dense(1 if classes == 2 else classes, name="logits")(keras.layers.Flatten()(pixels))
    return keras.Model(image, logits)


RANDOM_LABELS = np.random.default_rng(1).integers(0, 5, 37)


@pytest.mark.parametrize("scale", [1.0, 60.0, 400.0], ids=["soft", "saturated", "extreme"])
@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        (2, RANDOM_LABELS % 2),
        (5, RANDOM_LABELS),
        # Class 3 does not occur.
        (5, np.where(RANDOM_LABELS == 3, 1, RANDOM_LABELS)),
    ],
    ids=["binary", "classes", "missing-class"],
)
def test_validation_equals_the_evaluation_of_the_published_model(classes, labels, scale):
    split, model = Pixels(labels), make_classifier(classes, scale)
    result = Validation(split, classes=classes, batch_size=4, auc=True).evaluate(model, make_loss("auto", classes))
    probabilities = add_probabilities(model, classes).predict(split.load_images(np.arange(split.size)), verbose=0)
    published = evaluate_predictions(probabilities, split.labels, tuple("abcde"[:classes]))
    # Processors with wide vectors round batches of another size differently, which can decide one tie in 286 pairs. The
    # AUC of the logits is off by at least three pairs.
    assert result["auc"] == pytest.approx(published.auc, abs=0.6 / 286)
    assert result["accuracy"] == published.accuracy
    # Saturated probabilities tie, although their logits differ.
    assert (len(np.unique(probabilities)) < probabilities.size) == (scale > 1)
    if scale == 1:
        assert result["loss"] == pytest.approx(published.loss, rel=1e-5)


def test_images_are_evaluated_in_blocks_if_their_logits_are_large(monkeypatch):
    split, model, loss = Pixels(RANDOM_LABELS), make_classifier(5, 1.0), make_loss("auto", 5)
    at_once = Validation(split, classes=5, batch_size=4, auc=True).evaluate(model, loss)
    # Four blocks of at most 12 images.
    monkeypatch.setattr(validation_module, "BLOCK_BYTES", 4 * 5 * 12)
    blocks = Validation(split, classes=5, batch_size=4, auc=True).evaluate(model, loss)
    assert blocks == pytest.approx(at_once, rel=1e-6)


def test_auc_of_saturated_probabilities_differs_from_that_of_their_logits():
    logits = np.array([30.0, 40.0, 50.0, -2.0])
    labels = np.array([1, 0, 1, 0])
    second = (1 / (1 + np.exp(-logits))).astype(np.float32)
    assert roc_auc_score(labels, logits) == 0.75
    # The first three probabilities are exactly 1: each of these pairs counts half.
    assert roc_auc([np.stack([1 - second, second], axis=1)], labels) == 0.75
    labels = np.array([1, 0, 0, 0])
    assert roc_auc_score(labels, logits) == pytest.approx(1 / 3)
    assert roc_auc([np.stack([1 - second, second], axis=1)], labels) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("images", "classes"), [(40, 2), (300, 3), (60, 90), (100, 7)])
@pytest.mark.parametrize("decimals", [7, 1], ids=["distinct", "ties"])
def test_auc_equals_the_mean_of_scikit_learn_over_the_classes_that_occur(images, classes, decimals):
    random = np.random.default_rng(images)
    scores = random.random((images, classes)) * (1 + np.arange(classes))
    probabilities = np.round(scores / scores.sum(axis=1, keepdims=True), decimals).astype(np.float32)
    labels = random.integers(0, classes, images)
    occurring = [1] if classes == 2 else np.unique(labels)
    expected = np.mean([roc_auc_score(labels == index, probabilities[:, index]) for index in occurring])
    assert roc_auc(np.array_split(probabilities, 3), labels) == pytest.approx(expected, abs=1e-12)


def test_auc_is_undefined_if_one_class_occurs():
    assert roc_auc([np.full((3, 4), 0.25, np.float32)], np.array([2, 2, 2])) is None
    result = Validation(Pixels([1, 1, 1]), classes=2, batch_size=2, auc=True).evaluate(
        make_classifier(2, 1.0), make_loss("auto", 2)
    )
    assert set(result) == {"loss", "accuracy"}


def test_image_with_a_non_finite_loss_is_named():
    model = make_classifier(3, 1.0)
    model.get_layer("logits").bias.assign([np.nan, 0, 0])
    with pytest.raises(DataError, match=r"The loss is nan on 3 of 3 validation images: .*0\.png, 1\.png, 2\.png"):
        Validation(Pixels([0, 1, 2]), classes=3, batch_size=2, auc=False).evaluate(model, make_loss("auto", 3))
