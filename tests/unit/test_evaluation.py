"""Metrics of a classifier, compared with values computed by hand, and gates on them."""

import numpy as np
import pytest

from topwork.errors import DataError, GateError
from topwork.report.evaluation import calibration_bins, evaluate_predictions
from topwork.report.gates import check_gates, require_gates
from topwork.spec.evaluation import Gate

LABELS = np.array([0, 0, 1, 1], np.int64)
# Class 1 is predicted for the second, third and fourth image; the second is wrong.
TWO_CLASSES = np.array([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55], [0.2, 0.8]], np.float32)


def test_metrics_of_two_classes_match_values_computed_by_hand():
    evaluation = evaluate_predictions(TWO_CLASSES, LABELS, ("blue", "red"))
    assert evaluation.confusion == ((1, 1), (0, 2))
    assert evaluation.accuracy == 0.75
    assert evaluation.top5 == 1.0
    assert [(c.name, c.images, c.precision, c.recall) for c in evaluation.per_class] == [
        ("blue", 2, 1.0, 0.5),
        ("red", 2, pytest.approx(2 / 3), 1.0),
    ]
    assert evaluation.precision == pytest.approx((1 + 2 / 3) / 2)
    assert evaluation.recall == 0.75
    assert evaluation.f1 == pytest.approx((2 / 3 + 0.8) / 2)
    assert evaluation.auc == 0.75  # of four pairs of a blue and a red image, one is in the wrong order
    assert evaluation.loss == pytest.approx(-np.log([0.9, 0.4, 0.55, 0.8]).mean(), abs=1e-6)
    # Four images in four bins: |1 - .9|, |0 - .6|, |1 - .55| and |1 - .8|, each a quarter.
    assert evaluation.calibration_error == pytest.approx((0.1 + 0.6 + 0.45 + 0.2) / 4, abs=1e-6)


def test_top5_of_six_classes_excludes_only_the_least_probable():
    probabilities = np.tile(np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03], np.float32), (6, 1))
    evaluation = evaluate_predictions(probabilities, np.arange(6), tuple("abcdef"))
    assert evaluation.top5 == pytest.approx(5 / 6)
    assert evaluation.accuracy == pytest.approx(1 / 6)


def test_auc_of_many_classes_is_the_mean_over_occurring_classes():
    probabilities = np.array([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], np.float32)
    evaluation = evaluate_predictions(probabilities, np.array([0, 1, 1, 1]), ("a", "b", "never"))
    assert evaluation.auc == 1.0
    assert evaluation.per_class[2].images == 0


def test_auc_is_undefined_if_only_one_class_occurs():
    evaluation = evaluate_predictions(TWO_CLASSES[:2], LABELS[:2], ("blue", "red"))
    assert evaluation.auc is None
    assert "auc" not in evaluation.metrics


def test_calibration_bins_include_their_upper_bound():
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5], [0.6, 0.4]], np.float32)
    bins = calibration_bins(probabilities, np.array([0, 0, 1]))
    assert [(round(b.low, 4), round(b.high, 4), b.images, b.accuracy) for b in bins] == [
        (0.4667, 0.5333, 1, 1.0),
        (0.6, 0.6667, 1, 0.0),
        (0.9333, 1.0, 1, 1.0),
    ]


def test_evaluation_rejects_non_finite_probabilities():
    with pytest.raises(
        DataError,
        match=r"NaN or infinite probabilities for 1 of 2 images: training diverged",
    ):
        evaluate_predictions(np.array([[np.nan, 0.5], [0.5, 0.5]], np.float32), np.array([0, 1]), ("a", "b"))


def test_evaluation_rejects_an_empty_split():
    with pytest.raises(DataError, match="The test split has no images"):
        evaluate_predictions(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), ("a", "b"))


def gate_results(gates, values, latest=None):
    return check_gates(tuple(Gate.model_validate(gate) for gate in gates), values, latest, "cats/3")


def test_every_condition_of_every_gate_is_checked_and_explained():
    results = gate_results(
        [
            {"metric": "accuracy", "atLeast": 0.9},
            {"metric": "calibrationError", "atMost": 0.05},
            {"metric": "f1", "atLeastLatestMinus": 0.01},
            {"metric": "recall", "atLeastLatestMinus": 0.02},
        ],
        {"accuracy": 0.85, "calibrationError": 0.04, "f1": 0.7, "recall": 0.79},
        {"f1": 0.72, "recall": 0.8},
    )
    assert [(gate.met, gate.sentence) for gate in results] == [
        (False, "accuracy is 0.8500, but the gate requires at least 0.9"),
        (True, "calibrationError is 0.0400, and the gate requires at most 0.05"),
        (False, "f1 is 0.7000, but the gate requires at least 0.7100 (0.7200 of cats/3 minus 0.01)"),
        (True, "recall is 0.7900, and the gate requires at least 0.7800 (0.8000 of cats/3 minus 0.02)"),
    ]
    with pytest.raises(GateError) as raised:
        require_gates(results, "s3://b/runs/cats-1/publish")
    assert str(raised.value) == (
        "Not published: accuracy is 0.8500, but the gate requires at least 0.9; f1 is 0.7000, but the gate requires at "
        "least 0.7100 (0.7200 of cats/3 minus 0.01). The evaluation and the report are stored at "
        "s3://b/runs/cats-1/publish. Improve the data or the training, or change spec.evaluate.gates."
    )


def test_gate_on_the_latest_version_is_met_by_the_first_version():
    (result,) = gate_results([{"metric": "f1", "atLeastLatestMinus": 0.01}], {"f1": 0.1})
    assert result.met
    assert result.sentence == "f1 is 0.1000, and there is no published version to compare with"


def test_gate_on_an_undefined_metric_is_not_met():
    (result,) = gate_results([{"metric": "auc", "atMost": 1.0}], {"f1": 0.1})
    assert not result.met
    assert result.sentence == (
        "auc is undefined on this split because fewer than two classes occur, so the gate is not met"
    )
