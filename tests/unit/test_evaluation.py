"""Metrics of a classifier, compared with values computed by hand, and gates on them."""

import numpy as np
import pytest

from topwork.errors import DataError, GateError
from topwork.model.probabilities import mean_auc
from topwork.report.evaluation import MAX_CONFUSIONS, calibration_bins, evaluate_predictions
from topwork.report.gates import LatestVersion, check_gates, require_gates
from topwork.report.predictions import collect_predictions
from topwork.report.statistics.paired import WorseTest
from topwork.spec.evaluation import Gate

LABELS = np.array([0, 0, 1, 1], np.int64)
# Class 1 is predicted for the second, third and fourth image; the second is wrong.
TWO_CLASSES = np.array([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55], [0.2, 0.8]], np.float32)


def test_metrics_of_two_classes_match_values_computed_by_hand():
    evaluation = evaluate_predictions(TWO_CLASSES, LABELS, ("blue", "red"))
    assert evaluation.confusion == ((1, 1), (0, 2))
    assert evaluation.accuracy == 0.75
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


def one_hot(predicted, classes):
    return np.eye(classes, dtype=np.float32)[predicted]


@pytest.mark.parametrize(
    ("labels", "predicted", "expected", "excluded"),
    [
        ([0] * 9 + [1] * 9 + [2] * 9, [0] * 9 + [1] * 9 + [2] * 9, (1.0, 1.0, 1.0), ("d",)),
        ([0, 0, 1, 1], [0, 0, 1, 0], ((2 / 3 + 1) / 2, 0.75, (0.8 + 2 / 3) / 2), ("c", "d")),
        # Class c has no images but is predicted: its false positives are missing in the recall of a.
        ([0, 0, 1, 3], [0, 2, 1, 3], (1.0, (0.5 + 1 + 1) / 3, (2 / 3 + 1 + 1) / 3), ("c",)),
        # Class b occurs and is never predicted: it counts, with precision 0.
        ([0, 0, 1], [0, 0, 0], (1 / 3, 0.5, 0.4), ("c", "d")),
        ([3, 3], [3, 3], (1.0, 1.0, 1.0), ("a", "b", "c")),
    ],
)
def test_averages_exclude_classes_without_images(labels, predicted, expected, excluded):
    evaluation = evaluate_predictions(one_hot(predicted, 4), np.array(labels), tuple("abcd"))
    assert (evaluation.precision, evaluation.recall, evaluation.f1) == pytest.approx(expected)
    assert evaluation.excluded_classes == len(excluded)
    assert evaluation.excluded_class_names == excluded
    assert [c.name for c in evaluation.per_class if (c.precision, c.recall, c.f1) == (None, None, None)] == [*excluded]
    (note,) = evaluation.notes
    assert note.startswith(f"{len(excluded)} of 4 classes ha")
    assert note.endswith(f"excluded from precision, recall, F1 and AUC: {', '.join(excluded)}.")


def test_number_of_named_excluded_classes_is_limited():
    names = tuple(f"class {index}" for index in range(50))
    evaluation = evaluate_predictions(one_hot([0, 1], 50), np.array([0, 1]), names)
    assert evaluation.excluded_classes == 48
    assert evaluation.notes[0].endswith("class 20, class 21 and 28 more.")


def test_evaluation_of_all_classes_has_no_notes():
    assert evaluate_predictions(TWO_CLASSES, LABELS, ("blue", "red")).notes == ()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_top5_is_not_reported_with_fewer_than_six_classes(classes):
    evaluation = evaluate_predictions(one_hot([0, 1], classes), np.array([0, 1]), tuple("abcde"[:classes]))
    assert evaluation.top5 is None
    assert "top5" not in evaluation.metrics
    assert "top5" in evaluation.undefined


def test_auc_equals_scikit_learn_for_any_batches():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(5)
    labels = random.integers(0, 7, 200)  # class 7 does not occur
    # Rounded, so that many probabilities are equal, also 0.
    probabilities = random.dirichlet(np.full(8, 0.3), 200).round(2).astype(np.float32)
    expected = np.mean([roc_auc_score(labels == index, probabilities[:, index]) for index in range(7)])

    def batches():
        return (probabilities[start : start + 11] for start in range(0, 200, 11))

    own = collect_predictions(batches, labels).own
    assert mean_auc(batches, labels, own, 8) == pytest.approx(expected, abs=1e-12)
    assert evaluate_predictions(probabilities, labels, tuple("abcdefgh")).auc == pytest.approx(expected, abs=1e-12)


def test_auc_of_two_classes_equals_scikit_learn():
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(6)
    labels, second = random.integers(0, 2, 99), random.random(99).astype(np.float32)
    evaluation = evaluate_predictions(np.stack([1 - second, second], axis=1), labels, ("a", "b"))
    assert evaluation.auc == pytest.approx(roc_auc_score(labels, second), abs=1e-12)


def test_predictions_keep_the_probabilities_of_requested_images():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 10).astype(np.float32)
    keep = np.array([0, 3, 4, 9])
    kept = collect_predictions(lambda: np.split(probabilities, [4, 5]), np.zeros(10, np.int64), keep=keep).kept
    np.testing.assert_array_equal(kept, probabilities[keep])


def test_confusions_of_many_classes_are_sparse_and_sorted():
    random = np.random.default_rng(1)
    names = tuple(f"class {index}" for index in range(2000))
    labels, predicted = random.integers(0, 2000, 6000), random.integers(0, 2000, 6000)
    labels[:7], predicted[:7] = 4, 9
    evaluation = evaluate_predictions(one_hot(predicted, 2000), labels, names)
    assert evaluation.confusion is None
    assert len(evaluation.confusions) == MAX_CONFUSIONS < evaluation.confused_pairs
    worst = evaluation.confusions[0]
    assert (worst.true_class, worst.predicted_class, worst.images) == ("class 4", "class 9", 7)
    assert worst.share == 7 / np.sum(labels == 4)
    images = [confusion.images for confusion in evaluation.confusions]
    assert images == sorted(images, reverse=True)
    assert evaluation.confused_pairs == len({*zip(labels, predicted, strict=True)} - {(n, n) for n in range(2000)})


def test_confusions_of_few_classes_are_those_of_the_matrix():
    evaluation = evaluate_predictions(one_hot([0, 1, 1, 0, 2], 3), np.array([0, 0, 0, 1, 2]), ("a", "b", "c"))
    assert evaluation.confusion == ((1, 2, 0), (1, 0, 0), (0, 0, 1))
    assert [(c.true_class, c.predicted_class, c.images) for c in evaluation.confusions] == [
        ("a", "b", 2),
        ("b", "a", 1),
    ]
    assert [(c.images, c.predicted) for c in evaluation.per_class] == [(3, 2), (1, 2), (1, 1)]


def test_auc_is_undefined_if_only_one_class_occurs():
    evaluation = evaluate_predictions(TWO_CLASSES[:2], LABELS[:2], ("blue", "red"))
    assert evaluation.auc is None
    assert "auc" not in evaluation.metrics


def test_calibration_bins_include_their_upper_bound():
    bins = calibration_bins(np.array([1.0, 0.5, 0.6], np.float32), np.array([True, True, False]))
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


def gate_results(gates, values, latest=None, undefined=None):
    return check_gates(tuple(Gate.model_validate(gate) for gate in gates), values, latest, undefined)


def test_every_condition_of_every_gate_is_checked_and_explained():
    results = gate_results(
        [
            {"metric": "accuracy", "atLeast": 0.9},
            {"metric": "calibrationError", "atMost": 0.05},
            {"metric": "f1", "atLeastLatestMinus": 0.01},
            {"metric": "recall", "atLeastLatestMinus": 0.02},
        ],
        {"accuracy": 0.85, "calibrationError": 0.04, "f1": 0.7, "recall": 0.79},
        LatestVersion(version="cats/3", metrics={"f1": 0.72, "recall": 0.8}),
    )
    assert [(gate.met, gate.sentence) for gate in results] == [
        (False, "accuracy is 0.8500, but the gate requires at least 0.9"),
        (True, "calibrationError is 0.0400, and the gate requires at most 0.05"),
        (False, "f1 is 0.7000, but the gate requires at least 0.7100 (0.7200 of cats/3 on the same images minus 0.01)"),
        (
            True,
            "recall is 0.7900, and the gate requires at least 0.7800 (0.8000 of cats/3 on the same images minus 0.02)",
        ),
    ]
    with pytest.raises(GateError) as raised:
        require_gates(results, "s3://b/runs/cats-1/publish")
    assert str(raised.value) == (
        "Not published: accuracy is 0.8500, but the gate requires at least 0.9; f1 is 0.7000, but the gate requires at "
        "least 0.7100 (0.7200 of cats/3 on the same images minus 0.01). The evaluation and the report are stored at "
        "s3://b/runs/cats-1/publish. Improve the data or the training, or change spec.evaluate.gates."
    )


def test_gate_on_the_latest_version_is_met_by_the_first_version():
    (result,) = gate_results([{"metric": "f1", "atLeastLatestMinus": 0.01}], {"f1": 0.1})
    assert result.met
    assert result.sentence == "f1 is 0.1000, and there is no published version to compare with"


@pytest.mark.parametrize(
    ("latest", "met", "sentence"),
    [
        (
            LatestVersion(version="cats/3", reason="it has other classes"),
            False,
            "f1 is 0.9000, but atLeastLatestMinus cannot compare it with cats/3: it has other classes. Remove "
            "atLeastLatestMinus for this run, or publish under another name (spec.publish.name)",
        ),
        (
            LatestVersion(version="cats/3", metrics={"accuracy": 0.1}),
            False,
            "f1 is 0.9000, but atLeastLatestMinus cannot compare it with cats/3: its f1 is undefined on this split. "
            "Remove atLeastLatestMinus for this run, or publish under another name (spec.publish.name)",
        ),
        (
            LatestVersion(version="cats/3", same_weights=True),
            True,
            "f1 is 0.9000, and cats/3 has the same weights, so there is nothing to compare",
        ),
    ],
)
def test_gate_explains_why_the_latest_version_is_not_compared(latest, met, sentence):
    (result,) = gate_results([{"metric": "f1", "atLeastLatestMinus": 0.01}], {"f1": 0.9}, latest)
    assert (result.met, result.sentence) == (met, sentence)


NOT_WORSE = {"metric": "accuracy", "notWorseThanLatest": {}}


@pytest.mark.parametrize(("p_value", "met"), [(0.051, True), (0.049, False)])
def test_gate_fails_only_if_the_model_is_significantly_worse(p_value, met):
    test = WorseTest(images=400, p_value=p_value, gained=12, lost=23)
    latest = LatestVersion(version="cats/3", metrics={"accuracy": 0.92}, tests={"accuracy": test})
    (result,) = gate_results([NOT_WORSE], {"accuracy": 0.8925}, latest)
    assert result.met == met
    assert result.sentence == (
        f"accuracy is 0.8925, {'and' if met else 'but'} the gate requires no significant decrease from 0.9200 of "
        f"cats/3 on the same images (p = {p_value}, confidence 0.95, 400 images, of which 12 are newly right and 23 "
        "newly wrong)"
    )
    (result,) = gate_results([NOT_WORSE | {"notWorseThanLatest": {"confidence": 0.9}}], {"accuracy": 0.8925}, latest)
    assert not result.met


def test_gate_names_the_direction_in_which_a_metric_becomes_worse():
    test = WorseTest(images=9, p_value=1)
    latest = LatestVersion(version="cats/3", metrics={"calibrationError": 0.02}, tests={"calibrationError": test})
    gate = {"metric": "calibrationError", "notWorseThanLatest": {}}
    (result,) = gate_results([gate], {"calibrationError": 0.01}, latest)
    assert result.met
    assert "no significant increase from 0.0200 of cats/3 on the same images (p = 1, confidence" in result.sentence


@pytest.mark.parametrize(
    ("latest", "met", "reason"),
    [
        (None, True, "there is no published version to compare with"),
        (LatestVersion(version="cats/3", same_weights=True), True, "cats/3 has the same weights"),
        (
            LatestVersion(version="cats/3", reason="it has other classes"),
            False,
            "notWorseThanLatest cannot compare it with cats/3: it has other classes. Remove notWorseThanLatest for",
        ),
        (
            LatestVersion(version="cats/3", metrics={"accuracy": 0.9}),
            False,
            "cannot compare it with cats/3: accuracy cannot be resampled for so many images and classes. Remove",
        ),
    ],
)
def test_gate_without_a_test_has_the_policy_of_the_other_gate_on_the_latest_version(latest, met, reason):
    (result,) = gate_results([NOT_WORSE], {"accuracy": 0.9}, latest)
    assert result.met == met
    assert reason in result.sentence


def test_gate_on_an_undefined_metric_is_not_met():
    evaluation = evaluate_predictions(one_hot([0, 0], 3), np.array([0, 0]), ("a", "b", "c"))
    gates = [{"metric": "auc", "atMost": 1.0}, {"metric": "top5", "atLeast": 0.9}]
    results = gate_results(gates, evaluation.metrics, undefined=evaluation.undefined)
    assert [(gate.met, gate.sentence) for gate in results] == [
        (False, "auc is undefined on this split because fewer than two classes occur, so the gate is not met"),
        (
            False,
            "top5 is undefined on this split because the model has only 3 classes: among five guesses is always the "
            "right one, so the gate is not met",
        ),
    ]
