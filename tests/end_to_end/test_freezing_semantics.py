"""Semantics of `trainable`: freezing functions of the stages and batch normalization of Keras."""

import keras
import numpy as np
import pytest

from topwork.model.freezing import count_parameters, frozen_variables, hash_variables, set_trainable
from topwork.model.layer_tree import leaf_layers


@pytest.fixture
def classifier():
    """A dense head on a base with nested models; the innermost model has batch normalization."""
    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()])
    middle = keras.Sequential([keras.Input((8, 8, 3)), inner, keras.layers.Conv2D(4, 3, activation="relu")])
    pixels = keras.Input((8, 8, 3))
    base = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(middle(pixels)), name="base")
    image = keras.Input((8, 8, 3))
    return keras.Model(image, keras.layers.Dense(1, name="logits")(base(image)))


def train_one_step(model):
    random = np.random.default_rng(0)
    model.train_on_batch(random.normal(3, 2, (16, 8, 8, 3)), random.integers(0, 2, (16, 1)))


def compile_model(model):
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))


def find_batch_normalization(model):
    return next(layer for layer in leaf_layers(model) if isinstance(layer, keras.layers.BatchNormalization))


def test_batch_normalization_has_two_trainable_and_two_non_trainable_weights():
    dense, batch_norm = keras.layers.Dense(3), keras.layers.BatchNormalization()
    for layer in (dense, batch_norm):
        layer.build((None, 4))
    assert (len(dense.trainable_weights), len(dense.non_trainable_weights)) == (2, 0)
    assert (len(batch_norm.trainable_weights), len(batch_norm.non_trainable_weights)) == (2, 2)


def test_count_parameters_counts_moving_statistics_as_frozen(classifier):
    set_trainable(classifier.get_layer("base"), "all", batch_norm=True)
    groups = count_parameters(classifier)
    first, second = 3 * 3 * 3 * 4 + 4, 3 * 3 * 4 * 4 + 4
    assert sum(group.trainable for group in groups) == first + 2 * 4 + second + (4 + 1)
    assert sum(group.frozen for group in groups) == 2 * 4


def test_freezing_a_model_freezes_every_nested_layer(classifier):
    base = classifier.get_layer("base")
    set_trainable(base, "none")
    assert [layer.name for layer in leaf_layers(base) if layer.trainable] == []
    assert base.trainable_weights == []
    assert [weight.path.split("/")[0] for weight in classifier.trainable_weights] == ["logits", "logits"]


def test_frozen_weights_are_bit_identical_after_training(classifier):
    set_trainable(classifier.get_layer("base"), "none")
    compile_model(classifier)
    before, kernel = hash_variables(frozen_variables(classifier)), classifier.get_layer("logits").get_weights()[0]
    train_one_step(classifier)
    assert len(frozen_variables(classifier)) == 2 + 4 + 2
    assert hash_variables(frozen_variables(classifier)) == before
    assert np.any(classifier.get_layer("logits").get_weights()[0] != kernel)


def test_changed_trainable_takes_effect_after_compile(classifier):
    base = classifier.get_layer("base")
    set_trainable(base, "none")
    compile_model(classifier)
    train_one_step(classifier)
    before = hash_variables(base.weights)
    set_trainable(base, "all")
    train_one_step(classifier)
    assert hash_variables(base.weights) == before
    compile_model(classifier)
    train_one_step(classifier)
    assert hash_variables(base.weights) != before


def test_frozen_batch_normalization_runs_in_inference_mode(classifier):
    set_trainable(classifier.get_layer("base"), "none")
    batch_norm = find_batch_normalization(classifier)
    images = np.random.default_rng(2).normal(3, 2, (4, 6, 6, 4)).astype("float32")
    assert np.array_equal(batch_norm(images, training=True), batch_norm(images, training=False))


def test_batch_normalization_of_an_unfrozen_base_stays_in_inference_mode(classifier):
    base = classifier.get_layer("base")
    set_trainable(base, "all")
    compile_model(classifier)
    batch_norm, all_weights = hash_variables(find_batch_normalization(classifier).weights), hash_variables(base.weights)
    train_one_step(classifier)
    assert hash_variables(find_batch_normalization(classifier).weights) == batch_norm
    assert hash_variables(base.weights) != all_weights
