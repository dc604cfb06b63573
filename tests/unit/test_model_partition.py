"""Partitioning a classifier into a frozen and a trainable part."""

import keras
import numpy as np
import pytest

from topwork.model.classifier import build_head
from topwork.model.freezing import set_trainable
from topwork.model.partition import count_multiplications, partition_model
from topwork.spec.fine_tune import UnfreezeFrom
from topwork.spec.model import Head

PIXELS = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
layers = keras.layers


def convolution(name, filters=4, **options):
    return layers.Conv2D(filters, 3, padding="same", name=name, **options)


def residual(pixels):
    maps = convolution("one")(pixels)
    inner = layers.Dropout(0.5)(convolution("two")(maps))
    maps = layers.Add(name="added")([maps, convolution("three")(inner)])
    return convolution("four")(
        layers.Concatenate(name="joined")([convolution("left")(maps), convolution("right")(maps)])
    )


def two_lanes(pixels):
    """Each layer takes the outputs of the two layers before it, like the cells of NASNet."""
    first, second = convolution("one")(pixels), convolution("two")(pixels)
    for name in ("three", "four"):
        first, second = second, convolution(name)(layers.Add()([first, second]))
    return layers.Add()([first, second])


def twice(pixels):
    shared = convolution("shared", 3)
    return convolution("top")(shared(layers.ReLU()(shared(pixels))))


def nested(pixels):
    image = keras.Input((16, 16, 3))
    inner = keras.Model(image, convolution("two")(convolution("one")(image)), name="inner")
    return convolution("top")(inner(pixels))


def classifier(build_base):
    keras.utils.set_random_seed(1)
    pixels = keras.Input((16, 16, 3))
    base = keras.Model(pixels, build_base(pixels), name="base")
    image = keras.Input((16, 16, 3), name="image")
    scaled = layers.Rescaling(1 / 255, name="input_scaling")(image)
    return keras.Model(image, build_head(base(scaled), Head(hidden=(5,), dropout=0.0), 3))


def partition(model, unfreeze):
    set_trainable(model.get_layer("base"), unfreeze)
    return partition_model(model)


def names(model):
    return {weight.path.split("/")[-2] for weight in model.weights}


@pytest.mark.parametrize(
    ("lowest", "below", "shape"),
    [
        ("four", {"one", "two", "three", "left", "right"}, (16, 16, 8)),
        ("right", {"one", "two", "three"}, (16, 16, 4)),
        ("three", {"one"}, (16, 16, 4)),
    ],
)
def test_partition_is_at_the_highest_tensor_that_all_paths_go_through(lowest, below, shape):
    model = classifier(residual)
    result = partition(model, UnfreezeFrom.model_validate({"from": lowest}))
    assert names(result.frozen_part) == below
    assert result.feature_shape == shape
    expected = model(PIXELS, training=False)
    np.testing.assert_array_equal(
        result.trainable_part(result.frozen_part(PIXELS, training=False), training=False), expected
    )
    np.testing.assert_array_equal(result.recombine()(PIXELS, training=False), expected)
    trained = [id(variable) for variable in model.trainable_variables]
    assert [id(variable) for variable in result.trainable_part.trainable_variables] == trained
    assert [id(variable) for variable in result.recombine().trainable_variables] == trained


def test_pooling_of_a_frozen_base_is_in_the_frozen_part():
    model = classifier(residual)
    result = partition(model, "none")
    assert (result.feature_shape, names(result.trainable_part)) == ((4,), {"hidden_1", "logits"})
    np.testing.assert_array_equal(result.recombine()(PIXELS, training=False), model(PIXELS, training=False))


def test_nested_model_below_the_trainable_layers_is_in_the_frozen_part():
    model = classifier(nested)
    parts = partition(model, UnfreezeFrom.model_validate({"from": "top"}))
    assert names(parts.frozen_part) == {"one", "two"}
    np.testing.assert_allclose(parts.trainable_part(parts.frozen_part(PIXELS)), model(PIXELS), rtol=1e-5)


def test_partition_is_none_if_everything_is_trained_or_paths_never_meet():
    assert partition(classifier(residual), "all") is None
    assert partition(classifier(two_lanes), UnfreezeFrom.model_validate({"from": "four"})) is None


def test_partition_never_splits_a_shared_layer():
    model = classifier(twice)
    assert partition(model, UnfreezeFrom.model_validate({"from": "top"})) is None
    assert partition(model, "none").feature_shape == (4,)


def test_recombined_model_runs_the_frozen_part_in_inference_mode():
    model = classifier(residual)
    recombined = partition(model, UnfreezeFrom.model_validate({"from": "four"})).recombine()
    expected = model(PIXELS, training=False)
    assert np.abs(model(PIXELS, training=True) - expected).max() > 0
    np.testing.assert_array_equal(recombined(PIXELS, training=True), expected)


def test_multiplications_are_counted_at_every_output_position():
    image = keras.Input((8, 8, 3))
    maps = layers.Conv2D(4, 3, strides=2, padding="same")(image)
    maps = layers.DepthwiseConv2D(3, padding="same")(maps)
    model = keras.Model(image, layers.Dense(5)(layers.Flatten()(maps)))
    assert count_multiplications(model) == 16 * 3 * 3 * 3 * 4 + 16 * 3 * 3 * 4 + 64 * 5
