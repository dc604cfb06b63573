"""A classifier cut below all that is trained, and what keeping the features of the lower half would save."""

import keras
import numpy as np
import pytest

from topwork.model.classifier import logits
from topwork.model.freezing import unfreeze
from topwork.model.partition import halves, multiplications
from topwork.spec.feature_cache import FeatureCache
from topwork.spec.model import Augmentation, Head
from topwork.spec.training import UnfreezeFrom
from topwork.training.feature_cache.policy import caching, gain, keeps_features

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
    """Each layer takes the outputs of two before it, as the cells of NASNet do."""
    first, second = convolution("one")(pixels), convolution("two")(pixels)
    for name in ("three", "four"):
        first, second = second, convolution(name)(layers.Add()([first, second]))
    return layers.Add()([first, second])


def twice(pixels):
    shared = convolution("shared", 3)
    return convolution("top")(shared(layers.ReLU()(shared(pixels))))


def classifier(base_of):
    keras.utils.set_random_seed(1)
    pixels = keras.Input((16, 16, 3))
    base = keras.Model(pixels, base_of(pixels), name="base")
    image = keras.Input((16, 16, 3), name="image")
    scaled = layers.Rescaling(1 / 255, name="input_scaling")(image)
    return keras.Model(image, logits(base(scaled), Head(hidden=(5,), dropout=0.0), 3))


def cut(model, what):
    unfreeze(model.get_layer("base"), what)
    return halves(model)


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
def test_the_cut_is_the_highest_point_that_all_paths_pass(lowest, below, shape):
    model = classifier(residual)
    found = cut(model, UnfreezeFrom.model_validate({"from": lowest}))
    assert names(found.lower) == below
    assert found.feature_shape == shape
    expected = model(PIXELS, training=False)
    np.testing.assert_array_equal(found.upper(found.lower(PIXELS, training=False), training=False), expected)
    np.testing.assert_array_equal(found.joined()(PIXELS, training=False), expected)
    trained = [id(variable) for variable in model.trainable_variables]
    assert [id(variable) for variable in found.upper.trainable_variables] == trained
    assert [id(variable) for variable in found.joined().trainable_variables] == trained


def test_a_frozen_base_is_pooled_below_the_cut():
    model = classifier(residual)
    found = cut(model, "none")
    assert (found.feature_shape, names(found.upper)) == ((4,), {"hidden_1", "logits"})
    np.testing.assert_array_equal(found.joined()(PIXELS, training=False), model(PIXELS, training=False))


def test_nothing_is_cut_where_all_is_trained_or_no_layer_is_passed_by_all_paths():
    assert cut(classifier(residual), "all") is None
    assert cut(classifier(two_lanes), UnfreezeFrom.model_validate({"from": "four"})) is None


def test_a_layer_that_is_used_twice_stays_whole():
    model = classifier(twice)
    assert cut(model, UnfreezeFrom.model_validate({"from": "top"})) is None
    assert cut(model, "none").feature_shape == (4,)


def test_the_lower_half_is_in_inference_mode_while_the_upper_one_is_trained():
    model = classifier(residual)
    joined = cut(model, UnfreezeFrom.model_validate({"from": "four"})).joined()
    expected = model(PIXELS, training=False)
    assert np.abs(model(PIXELS, training=True) - expected).max() > 0
    np.testing.assert_array_equal(joined(PIXELS, training=True), expected)


def test_multiplications_are_counted_at_each_place():
    image = keras.Input((8, 8, 3))
    maps = layers.Conv2D(4, 3, strides=2, padding="same")(image)
    maps = layers.DepthwiseConv2D(3, padding="same")(maps)
    model = keras.Model(image, layers.Dense(5)(layers.Flatten()(maps)))
    assert multiplications(model) == 16 * 3 * 3 * 3 * 4 + 16 * 3 * 3 * 4 + 64 * 5


@pytest.mark.parametrize(
    ("setting", "epochs", "augmentation", "views", "why_not"),
    [
        ("auto", 9, {}, 1, ""),
        ("auto", 9, {"flip": "both"}, 4, ""),
        ("auto", 3, {"flip": "both"}, 3, ""),
        ({"views": 7}, 9, {"flip": "both"}, 7, ""),
        ("off", 9, {}, 0, "featureCache is off"),
        ("auto", 9, {"cutMix": 1.0}, 0, "mixUp and cutMix mix other images at each step"),
    ],
)
def test_views_are_those_of_the_spec_or_as_many_as_epochs_and_four_at_most(
    setting, epochs, augmentation, views, why_not
):
    cache = FeatureCache.model_validate(setting) if isinstance(setting, dict) else FeatureCache.of(setting)
    found = caching(cache, epochs, Augmentation.model_validate(augmentation), all_trained=False)
    assert (found.views, found.why_not, found.asked) == (views, why_not, False)


def test_nothing_is_kept_where_all_is_trained_or_little_would_be_saved():
    none = caching(FeatureCache(use="on"), 9, Augmentation(), all_trained=True)
    assert keeps_features(none, 9, None) == (False, "all of the base is trained")
    found = cut(classifier(residual), UnfreezeFrom.model_validate({"from": "three"}))
    once = caching(FeatureCache(), 9, Augmentation(), all_trained=False)
    lower, upper = found.work
    assert gain(1, 9, found) == pytest.approx((9 * lower + 27 * upper) / (lower + 27 * upper))
    kept, reason = keeps_features(once, 9, found)
    assert (kept, reason) == (False, "the frozen layers run once instead of 9 times, about 1.0 times less to compute")
    asked = caching(FeatureCache(use="on"), 9, Augmentation(), all_trained=False)
    assert keeps_features(asked, 9, found)[0]
    assert keeps_features(once, 9, None) == (False, "no frozen layers lie below all that is trained")
