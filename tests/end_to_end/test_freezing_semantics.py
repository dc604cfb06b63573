"""What `trainable` means, by the functions that the stages freeze with; what a run shows is in the other modules."""

import keras
import numpy as np
import pytest

from topwork.model.freezing import count_parameters, frozen_variables, hash_variables, set_trainable
from topwork.model.layer_tree import leaf_layers


@pytest.fixture
def classifier():
    """A dense head on a base that holds a model within a model, with batch normalization in the innermost."""
    keras.utils.set_random_seed(1)
    inner = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()])
    middle = keras.Sequential([keras.Input((8, 8, 3)), inner, keras.layers.Conv2D(4, 3, activation="relu")])
    pixels = keras.Input((8, 8, 3))
    base = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(middle(pixels)), name="base")
    image = keras.Input((8, 8, 3))
    return keras.Model(image, keras.layers.Dense(1, name="logits")(base(image)))


def train(model):
    random = np.random.default_rng(0)
    model.train_on_batch(random.normal(3, 2, (16, 8, 8, 3)), random.integers(0, 2, (16, 1)))


def compiled(model):
    model.compile("adam", keras.losses.BinaryCrossentropy(from_logits=True))


def normalization(model):
    return next(layer for layer in leaf_layers(model) if isinstance(layer, keras.layers.BatchNormalization))


def test_dense_has_two_trainable_weights_and_batch_normalization_two_and_two_that_are_not():
    dense, normal = keras.layers.Dense(3), keras.layers.BatchNormalization()
    for layer in (dense, normal):
        layer.build((None, 4))
    assert (len(dense.trainable_weights), len(dense.non_trainable_weights)) == (2, 0)
    assert (len(normal.trainable_weights), len(normal.non_trainable_weights)) == (2, 2)


def test_layer_groups_count_them_so(classifier):
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
    compiled(classifier)
    before, head = hash_variables(frozen_variables(classifier)), classifier.get_layer("logits").get_weights()[0]
    train(classifier)
    assert len(frozen_variables(classifier)) == 2 + 4 + 2
    assert hash_variables(frozen_variables(classifier)) == before
    assert np.any(classifier.get_layer("logits").get_weights()[0] != head)


def test_a_change_of_trainable_counts_only_after_compile(classifier):
    base = classifier.get_layer("base")
    set_trainable(base, "none")
    compiled(classifier)
    train(classifier)
    before = hash_variables(base.weights)
    set_trainable(base, "all")
    train(classifier)
    assert hash_variables(base.weights) == before
    compiled(classifier)
    train(classifier)
    assert hash_variables(base.weights) != before


def test_frozen_batch_normalization_runs_in_inference_mode(classifier):
    set_trainable(classifier.get_layer("base"), "none")
    normal = normalization(classifier)
    images = np.random.default_rng(2).normal(3, 2, (4, 6, 6, 4)).astype("float32")
    assert np.array_equal(normal(images, training=True), normal(images, training=False))


def test_batch_normalization_stays_in_inference_mode_when_the_base_is_unfrozen(classifier):
    base = classifier.get_layer("base")
    set_trainable(base, "all")
    compiled(classifier)
    kept, moved = hash_variables(normalization(classifier).weights), hash_variables(base.weights)
    train(classifier)
    assert hash_variables(normalization(classifier).weights) == kept
    assert hash_variables(base.weights) != moved
