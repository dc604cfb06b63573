"""The temperature that calibrates probabilities, and how it is described."""

import numpy as np
import pytest

from topwork.model import calibration as model_calibration
from topwork.model.calibration import NotCalibratableError, fit_temperature
from topwork.report import calibration as report_calibration
from topwork.report.calibration import Calibration, fit_calibration, require_same_classes
from topwork.report.evaluation import evaluate_predictions
from topwork.report.predictions import array_batches, collect_predictions


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def calibrated_logits(images, classes, seed=0):
    """Logits of a perfectly calibrated classifier: labels are drawn from its probabilities."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (images, classes))
    labels = (softmax(logits).cumsum(axis=1) > random.random((images, 1))).argmax(axis=1)
    return logits, labels


def mean_loss(logits, labels, temperature):
    probabilities = softmax(logits.astype(np.float64) / temperature)
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0, 3.0, 12.0])
def test_temperature_undoes_a_factor_of_the_logits(factor):
    logits, labels = calibrated_logits(5000, 4)
    temperature = fit_temperature((factor * logits).astype(np.float32), labels)
    assert temperature == pytest.approx(factor, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_minimizes_the_loss(seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, (200, 3)).astype(np.float32)
    labels = np.where(random.random(200) < 0.6, logits.argmax(axis=1), random.integers(0, 3, 200))
    temperature = fit_temperature(logits, labels)
    lowest = mean_loss(logits, labels, temperature)
    for other in np.geomspace(model_calibration.MIN_TEMPERATURE, model_calibration.MAX_TEMPERATURE, 101):
        assert lowest <= mean_loss(logits, labels, other) + 1e-12
    assert mean_loss(logits, labels, 1.001 * temperature) > lowest < mean_loss(logits, labels, 0.999 * temperature)


def test_single_logit_is_that_of_the_second_of_two_classes():
    logits, labels = calibrated_logits(500, 2)
    difference = (logits[:, 1:] - logits[:, :1]).astype(np.float32)
    two = np.concatenate([np.zeros_like(difference), difference], axis=1)
    assert fit_temperature(3 * difference, labels) == pytest.approx(fit_temperature(3 * two, labels), rel=1e-9)
    assert fit_temperature(3 * difference, labels) == pytest.approx(3, rel=0.3)


def test_temperature_does_not_depend_on_the_size_of_the_blocks(monkeypatch):
    logits, labels = calibrated_logits(1000, 5)
    expected = fit_temperature(logits.astype(np.float32), labels)
    monkeypatch.setattr(model_calibration, "rows_per_block", lambda classes: 7)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(expected, rel=1e-9)


def test_huge_logits_do_not_overflow():
    logits, labels = calibrated_logits(2000, 3)
    assert fit_temperature((15 * logits + 1e4).astype(np.float32), labels) == pytest.approx(15, rel=0.1)


SEPARATED = np.array([[4.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 2.0]], np.float32)


@pytest.mark.parametrize(
    ("logits", "labels", "reason"),
    [
        (SEPARATED, [0, 1, 2], "all images are classified correctly, or nearly all of them"),
        (SEPARATED, [1, 2, 0], "the predicted classes are hardly better than guesses"),
        (np.zeros((4, 3), np.float32), [0, 1, 2, 0], "the predicted classes are hardly better than guesses"),
        (np.array([[np.nan], [1.0]], np.float32), [0, 1], "NaN or infinite"),
        (np.zeros((0, 3), np.float32), [], "there are no images"),
    ],
)
def test_images_that_determine_no_temperature_are_explained(logits, labels, reason):
    with pytest.raises(NotCalibratableError, match=reason):
        fit_temperature(logits, np.array(labels, np.int64))


def test_images_that_determine_no_temperature_leave_the_probabilities_uncalibrated():
    calibration = fit_calibration([SEPARATED[:2], SEPARATED[2:]], np.array([0, 1, 2]), 3)
    assert (calibration.temperature, calibration.images) == (None, 3)
    evaluation = evaluate_predictions(softmax(SEPARATED).astype(np.float32), np.array([0, 1, 2]), ("a", "b", "c"))
    (note,) = calibration.caveats(evaluation)
    assert note == (
        "The probabilities are not calibrated, because no temperature could be fitted on 3 images of the validation "
        "split: all images are classified correctly, or nearly all of them: the more confident the probabilities, the "
        "lower the loss, without a limit. Use more validation images, or set spec.evaluate.calibration to none."
    )


def test_large_split_is_fitted_on_evenly_spaced_images(monkeypatch):
    logits, labels = calibrated_logits(1000, 4)
    logits = (2 * logits).astype(np.float32)
    monkeypatch.setattr(report_calibration, "MAX_LOGIT_BYTES", 100 * 4 * 4)
    calibration = fit_calibration((logits[start : start + 64] for start in range(0, 1000, 64)), labels, 4)
    chosen = np.linspace(0, 999, 100).round().astype(int)
    assert calibration == Calibration(temperature=fit_temperature(logits[chosen], labels[chosen]), images=100)


def make_evaluations(factor, split="test"):
    logits, labels = calibrated_logits(2000, 3)
    names = ("a", "b", "c")
    after = evaluate_predictions(softmax(logits).astype(np.float32), labels, names, split)
    return evaluate_predictions(softmax(factor * logits).astype(np.float32), labels, names, split), after


def test_calibration_is_described_with_the_metrics_before_and_after():
    before, after = make_evaluations(3.0)
    calibration = Calibration(temperature=3.0, images=500).with_uncalibrated(before)
    assert calibration.caveats(after) == ()
    assert calibration.describe(after) == (
        "The probabilities are calibrated: the logits are divided by 3, a temperature that was fitted on 500 images of "
        f"the validation split. On the test split, this changed the loss from {before.loss:.4f} to {after.loss:.4f} "
        f"and the calibration error from {before.calibration_error:.4f} to {after.calibration_error:.4f}."
    )
    assert after.calibration_error < 0.05 < before.calibration_error


def test_temperature_that_makes_the_test_split_worse_is_a_caveat():
    worse, better = make_evaluations(3.0)
    (note,) = Calibration(temperature=0.3, images=12).with_uncalibrated(better).caveats(worse)
    assert note.startswith(
        f"Calibration made the probabilities worse: on the test split, the loss is {worse.loss:.4f} instead of "
        f"{better.loss:.4f}. The temperature was fitted on 12 validation images"
    )


def test_metrics_on_the_images_that_fitted_the_temperature_are_a_caveat():
    before, after = make_evaluations(3.0, "validation")
    (note,) = Calibration(temperature=3.0, images=2000).with_uncalibrated(before).caveats(after)
    assert note.startswith("The temperature was fitted on the images on which loss and calibration error are measured")


def predictions_of(probabilities):
    array = np.array(probabilities, np.float32)
    return collect_predictions(array_batches(array), np.zeros(len(array), np.int64))


def test_changed_classes_are_an_error_unless_their_probabilities_were_nearly_equal():
    before = predictions_of([[0.9, 0.1], [0.50001, 0.49999]])
    require_same_classes(before, predictions_of([[0.8, 0.2], [0.49999, 0.50001]]))
    with pytest.raises(RuntimeError, match="changed the predicted class of 1 of 2 images"):
        require_same_classes(before, predictions_of([[0.2, 0.8], [0.50001, 0.49999]]))
