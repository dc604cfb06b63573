"""Intervals and tests for two classifiers on the same images."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from topwork.report.evaluation import evaluate_predictions
from topwork.report.predictions import array_batches, collect_predictions
from topwork.report.statistics import bootstrap
from topwork.report.statistics.bootstrap import ScoredImages, bootstrap_interval, bootstrap_p_value, resample
from topwork.report.statistics.paired import count_differences, run_worse_tests
from topwork.report.statistics.shares import (
    correct_p_values,
    loss_p_value,
    mcnemar_p_value,
    paired_difference_interval,
    share_interval,
)

METRICS = ("accuracy", "top5", "precision", "recall", "f1", "auc", "calibrationError", "loss")


def score(probabilities, labels):
    predictions = collect_predictions(array_batches(probabilities), labels, keep=np.arange(len(labels)))
    return ScoredImages(labels, predictions, probabilities.shape[1])


def make_probabilities(labels, classes, seed, strength=1.0):
    """Probabilities with many ties: two digits after the point."""
    logits = np.random.default_rng(seed).normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += strength
    probabilities = np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), 2)
    return (probabilities / probabilities.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("count", "total"), [(0, 20), (20, 20), (7, 20), (995, 1000)])
def test_share_interval_is_the_wilson_interval(count, total):
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert share_interval(count, total, 0.95) == pytest.approx((expected.low, expected.high))


def test_p_values_are_those_of_the_binomial_test():
    for gained, lost in [*itertools.product(range(7), repeat=2), (400, 460), (460, 400), (0, 3000)]:
        total = max(1, gained + lost)
        expected = [1.0, 1.0]
        if gained + lost:
            expected = [binomtest(gained, total, alternative=kind).pvalue for kind in ("two-sided", "less")]
        found = [mcnemar_p_value(gained, lost), loss_p_value(gained, lost)]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-300), (gained, lost)


def test_paired_interval_is_that_of_agresti_and_min():
    # Wald interval of the table with half an image added to each cell: 10.5 gained, 20.5 lost, 102 in total.
    difference, variance = (10.5 - 20.5) / 102, (31 - 100 / 102) / 102**2
    half = 1.959964 * variance**0.5
    assert paired_difference_interval(10, 20, 100, 0.95) == pytest.approx((difference - half, difference + half))
    low, high = paired_difference_interval(0, 0, 20, 0.95)
    assert low == -high != 0


def test_p_values_are_corrected_by_holms_method():
    assert correct_p_values([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_p_values([0.6, 0.7]) == [1.0, 1.0]
    assert correct_p_values([0.2]) == [0.2]


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_metrics_of_a_resample_are_those_of_its_images(classes):
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, 60)
    labels[labels == classes - 1] = classes - 2 if classes > 2 else 1  # the last of several classes has no images
    probabilities = make_probabilities(labels, classes, seed=1)
    scored = score(probabilities, labels)
    for counts in (np.ones(60, np.int64), *itertools.islice(bootstrap.draw_counts(60, 5), 5)):
        drawn = np.repeat(np.arange(60), counts)
        names = tuple(str(index) for index in range(classes))
        expected = evaluate_predictions(probabilities[drawn], labels[drawn], names).metrics
        assert {name: scored.measure(name, counts) for name in METRICS if name in expected} == pytest.approx(expected)


def test_resamples_are_paired_and_repeatable():
    labels = np.random.default_rng(0).integers(0, 3, 50)
    first, second = (score(make_probabilities(labels, 3, seed), labels) for seed in (1, 2))
    found = resample((first, second, first), ("f1", "auc"))
    assert found.keys() == {"f1", "auc"}
    for values, again in zip(found["f1"], resample((first, second, first), ("f1",))["f1"], strict=True):
        assert (values == again).all()
    assert (found["auc"][0] == found["auc"][2]).all()
    assert np.std(found["auc"][0]) > 0


def test_resamples_without_a_value_are_dropped():
    labels = np.array([0, 0, 0, 1])  # a third of the resamples contain one class only
    (values,) = resample((score(make_probabilities(labels, 2, 0), labels),), ("auc",))["auc"]
    assert np.isfinite(values).all()
    assert 0.5 * bootstrap.RESAMPLES < len(values) < 0.8 * bootstrap.RESAMPLES


def test_auc_of_too_many_probabilities_is_not_resampled(monkeypatch):
    labels = np.random.default_rng(0).integers(0, 3, 50)
    scored = score(make_probabilities(labels, 3, 0), labels)
    for work, expected in ((150 * 250, 250), (150 * 150, 0)):
        monkeypatch.setattr(bootstrap, "MAX_AUC_WORK", work)
        found = resample((scored,), ("auc", "f1"))
        assert len(found["f1"][0]) == bootstrap.RESAMPLES
        assert len(found.get("auc", [[]])[0]) == expected


def test_bootstrap_interval_is_centered_on_the_measured_value():
    low, high = bootstrap_interval(0.5, np.linspace(0.6, 1.0, 1001), 0.95)
    assert (low, high) == pytest.approx((0.5 - 0.19, 0.5 + 0.19))
    assert bootstrap_interval(1.0, np.ones(100), 0.95) is None
    assert bootstrap_interval(0.7, np.zeros(0), 0.95) is None


def test_bootstrap_p_value_is_the_share_of_larger_losses():
    resampled = np.linspace(-1, 1, 2001)
    assert bootstrap_p_value(-0.9, resampled, 100) == pytest.approx(0.05, abs=0.001)
    assert bootstrap_p_value(0.9, resampled, 100) == pytest.approx(0.95, abs=0.001)
    assert bootstrap_p_value(0.0, np.zeros(10), 100) == 1.0


def test_number_of_resamples_does_not_limit_the_confidence():
    assert bootstrap_p_value(-2.0, np.linspace(-1, 1, 2001), 100) == pytest.approx(norm.cdf(-2 * 3**0.5), rel=0.01)
    labels = np.random.default_rng(0).integers(0, 3, 200)
    good, bad = (score(make_probabilities(labels, 3, 1, strength), labels) for strength in (9.0, 0.0))
    assert run_worse_tests(("f1",), bad, good)["f1"].p_value < 1e-6


def test_test_of_very_few_images_is_not_significant():
    """Resamples of a single image are all equal."""
    for images in (1, 4):
        labels = np.arange(images) % 2
        right = np.where(labels[:, np.newaxis] == [0, 1], 0.9, 0.1).astype(np.float32)
        tests = run_worse_tests(("accuracy", "f1", "loss"), score(1 - right, labels), score(right, labels))
        assert {name: test.p_value for name, test in tests.items()} == pytest.approx(
            dict.fromkeys(("accuracy", "f1", "loss"), 0.5**images)
        )


def test_model_is_worse_in_every_metric_if_it_knows_less():
    labels = np.random.default_rng(0).integers(0, 8, 300)
    good, bad = (score(make_probabilities(labels, 8, 1, strength), labels) for strength in (2.5, 0.5))
    worse, better = run_worse_tests(METRICS, bad, good), run_worse_tests(METRICS, good, bad)
    assert worse.keys() == better.keys() == set(METRICS)
    for name in set(METRICS) - {"calibrationError"}:
        assert worse[name].p_value < 0.01, name
        assert better[name].p_value > 0.9, name
    gained, lost = count_differences("accuracy", good, bad)
    assert (worse["accuracy"].gained, worse["accuracy"].lost) == (gained, lost)
    assert (better["accuracy"].gained, better["accuracy"].lost, better["accuracy"].images) == (lost, gained, 300)


def test_higher_calibration_error_is_worse():
    labels = np.zeros(200, np.int64)
    labels[:60] = 1
    honest, overconfident = (np.tile([p, 1 - p], (200, 1)).astype(np.float32) for p in (0.7, 0.99))
    tests = run_worse_tests(("calibrationError", "loss"), score(overconfident, labels), score(honest, labels))
    assert tests["calibrationError"].p_value < 0.01
    assert tests["loss"].p_value < 0.01
