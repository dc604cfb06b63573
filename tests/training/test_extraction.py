"""The frozen layers as a fast function: the same features, or as near as bfloat16 comes, and never further."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from topwork.model.classifier import in_precision
from topwork.training import strategy
from topwork.training.feature_cache import extractor
from topwork.training.feature_cache.extractor import Extraction
from topwork.training.strategy import policy, processor_has_bfloat16

IMAGES = tf.constant(np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype(np.float32))


class Kept:
    def __init__(self):
        self.notes = []

    def note(self, message, **facts):
        self.notes.append((message, facts))


@pytest.fixture(scope="module")
def lower():
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3))
    maps = keras.layers.Rescaling(1 / 255)(image)
    for filters in (8, 16):
        maps = keras.layers.Conv2D(filters, 3, strides=2, use_bias=False)(maps)
        maps = keras.layers.ReLU()(keras.layers.BatchNormalization()(maps))
    return keras.Model(image, keras.layers.GlobalAveragePooling2D()(keras.layers.Dropout(0.5)(maps)))


@pytest.fixture
def compiles(monkeypatch):
    monkeypatch.setattr(extractor, "WORTH_COMPILING", 0)


def extracted(lower, precision="auto"):
    progress = Kept()
    return Extraction(lower, precision=precision, images=4, progress=progress)(IMAGES), progress.notes


def test_few_images_go_through_the_model_as_it_is(lower):
    features, notes = extracted(lower)
    np.testing.assert_array_equal(features, lower.predict_on_batch(IMAGES))
    assert (features.dtype, notes) == (np.float32, [])


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_processor_without_bfloat16_computes_in_float32(lower, compiles, monkeypatch, precision):
    monkeypatch.setattr(extractor, "processor_has_bfloat16", lambda: False)
    features, notes = extracted(lower, precision)
    np.testing.assert_allclose(features, lower.predict_on_batch(IMAGES), rtol=1e-4, atol=1e-6)
    assert notes == []


def test_bfloat16_is_taken_where_a_sample_agrees(lower, compiles, monkeypatch):
    monkeypatch.setattr(extractor, "processor_has_bfloat16", lambda: True)
    features, ((message, facts),) = extracted(lower)
    exact = lower.predict_on_batch(IMAGES)
    assert (message, facts["computed_in"]) == ("precision of the frozen layers", "bfloat16")
    assert np.sqrt(np.square(features - exact).mean() / np.square(exact).mean()) <= 0.02
    if processor_has_bfloat16():
        assert facts["difference"] > 0


def test_bfloat16_that_disagrees_is_left_for_float32(lower, compiles, monkeypatch):
    monkeypatch.setattr(extractor, "processor_has_bfloat16", lambda: True)
    monkeypatch.setattr(extractor, "BFLOAT16_TOLERANCE", -1.0)
    features, ((_, facts),) = extracted(lower)
    np.testing.assert_array_equal(features, lower.predict_on_batch(IMAGES))
    assert facts["computed_in"] == "float32"


def test_a_model_in_half_precision_is_held_against_itself_in_float32(lower):
    features, ((_, facts),) = extracted(in_precision(lower, "mixed_bfloat16"))
    assert facts["computed_in"] == "bfloat16"
    assert 0 < facts["difference"] < 0.02
    named, notes = extracted(in_precision(lower, "mixed_bfloat16"), "mixed_bfloat16")
    np.testing.assert_array_equal(named, features)
    assert notes == []


def test_the_precision_of_training_goes_by_processor_and_model(monkeypatch):
    for has, work, expected in (
        (True, 2e9, "mixed_bfloat16"),
        (True, 1e8, "float32"),
        (False, 2e9, "float32"),
    ):
        monkeypatch.setattr(strategy, "processor_has_bfloat16", lambda has=has: has)
        assert policy("auto", work) == expected
    assert policy("float32", 2e9) == "float32"
    assert policy("mixed_float16", 0.0) == "mixed_float16"


def test_the_flags_of_the_processor_tell(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert not processor_has_bfloat16(cpuinfo)
    for flags, expected in (("fpu avx512_bf16 amx_tile", True), ("fpu avx512f avx512_bf16x", False)):
        cpuinfo.write_text(f"processor : 0\nmodel name : amx_bf16\nflags\t\t: {flags}\n")
        assert processor_has_bfloat16(cpuinfo) is expected
