"""The feature extractor: exact features, or features within the tolerance of bfloat16."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from structlog.testing import capture_logs

from topwork.model.classifier import with_precision
from topwork.training.distribution.strategy import cpu_supports_bfloat16
from topwork.training.feature_cache import extractor
from topwork.training.feature_cache.extractor import FeatureExtractor

IMAGES = tf.constant(np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def frozen_part():
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3))
    maps = keras.layers.Rescaling(1 / 255)(image)
    for filters in (8, 16):
        maps = keras.layers.Conv2D(filters, 3, strides=2, use_bias=False)(maps)
        maps = keras.layers.ReLU()(keras.layers.BatchNormalization()(maps))
    return keras.Model(image, keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.5)(maps)))


@pytest.fixture
def always_freeze_graph(monkeypatch):
    monkeypatch.setattr(extractor, "MIN_MULTIPLICATIONS_TO_FREEZE", 0)


def extract(model, precision="auto"):
    with capture_logs() as events:
        features = FeatureExtractor(model, precision=precision, images=4)(IMAGES)
    return features, events


def test_few_images_run_through_the_unchanged_model(frozen_part):
    features, events = extract(frozen_part)
    np.testing.assert_array_equal(features, frozen_part.predict_on_batch(IMAGES))
    assert (features.dtype, events) == (np.float32, [])


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_cpu_without_bfloat16_computes_in_float32(frozen_part, always_freeze_graph, monkeypatch, precision):
    monkeypatch.setattr(extractor, "cpu_supports_bfloat16", lambda: False)
    features, events = extract(frozen_part, precision)
    np.testing.assert_allclose(features, frozen_part.predict_on_batch(IMAGES), rtol=1e-4, atol=1e-6)
    assert events == []


def test_bfloat16_is_used_if_a_sample_is_within_tolerance(frozen_part, always_freeze_graph, monkeypatch):
    monkeypatch.setattr(extractor, "cpu_supports_bfloat16", lambda: True)
    features, (event,) = extract(frozen_part)
    exact = frozen_part.predict_on_batch(IMAGES)
    assert (event["event"], event["computed_in"]) == ("precision of the frozen layers", "bfloat16")
    assert np.sqrt(np.square(features - exact).mean() / np.square(exact).mean()) <= 0.02
    if cpu_supports_bfloat16():
        assert event["difference"] > 0


def test_float32_is_used_if_a_sample_exceeds_the_tolerance(frozen_part, always_freeze_graph, monkeypatch):
    monkeypatch.setattr(extractor, "cpu_supports_bfloat16", lambda: True)
    monkeypatch.setattr(extractor, "BFLOAT16_TOLERANCE", -1.0)
    features, (event,) = extract(frozen_part)
    np.testing.assert_array_equal(features, frozen_part.predict_on_batch(IMAGES))
    assert event["computed_in"] == "float32"


def test_mixed_precision_model_is_compared_with_its_float32_copy(frozen_part):
    features, (event,) = extract(with_precision(frozen_part, "mixed_bfloat16"))
    assert event["computed_in"] == "bfloat16"
    assert 0 < event["difference"] < 0.02
    with_named_precision, events = extract(with_precision(frozen_part, "mixed_bfloat16"), "mixed_bfloat16")
    np.testing.assert_array_equal(with_named_precision, features)
    assert events == []
