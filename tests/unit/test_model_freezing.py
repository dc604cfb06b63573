"""Freezing and unfreezing: trainable layers, parameter counts and hashes of frozen weights."""

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.freezing import (
    LayerGroup,
    count_parameters,
    frozen_variables,
    hash_variables,
    set_trainable,
    synchronize_batch_norm,
    verify_frozen_unchanged,
)
from topwork.model.layer_tree import walk_layers
from topwork.spec.fine_tune import UnfreezeFrom, UnfreezeLayers


@pytest.fixture
def model():
    """A classifier whose base contains a nested model."""
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, keras.layers.BatchNormalization(name="inner_norm")(inner_in), name="inner")
    pixels = keras.Input((8, 8, 3))
    maps = keras.layers.Conv2D(4, 3, padding="same", name="block1_conv")(pixels)
    maps = keras.layers.ReLU(name="relu")(inner(maps))
    maps = keras.layers.Conv2D(2, 1, name="block2_conv")(maps)
    base = keras.Model(pixels, maps, name="base")
    image = keras.Input((8, 8, 3), name="image")
    vector = keras.layers.Flatten(name="flatten")(base(image))
    vector = keras.layers.Dropout(0.5, name="dropout")(vector)
    return keras.Model(image, keras.layers.Dense(3, name="logits")(vector))


def from_layer(name):
    return UnfreezeFrom.model_validate({"from": name})


def trained_layers(model):
    return sorted({variable.path.split("/")[-2] for variable in model.trainable_variables})


@pytest.mark.parametrize(
    ("unfreeze", "batch_norm", "expected"),
    [
        ("none", False, ["logits"]),
        ("all", False, ["block1_conv", "block2_conv", "logits"]),
        ("all", True, ["block1_conv", "block2_conv", "inner_norm", "logits"]),
        (UnfreezeLayers(layers=1), False, ["block2_conv", "logits"]),
        (UnfreezeLayers(layers=2), False, ["block2_conv", "logits"]),
        (UnfreezeLayers(layers=2), True, ["block2_conv", "inner_norm", "logits"]),
        (UnfreezeLayers(layers=3), False, ["block1_conv", "block2_conv", "logits"]),
        (UnfreezeFrom.model_validate({"from": "relu"}), False, ["block2_conv", "logits"]),
        (UnfreezeFrom.model_validate({"from": "inner_norm"}), True, ["block2_conv", "inner_norm", "logits"]),
    ],
)
def test_set_trainable_does_not_depend_on_the_previous_setting(model, unfreeze, batch_norm, expected):
    base = model.get_layer("base")
    for previous in ("all", "none"):
        set_trainable(base, previous, batch_norm=True)
        set_trainable(base, unfreeze, batch_norm=batch_norm)
        assert trained_layers(model) == expected


def test_parameter_counts_match_keras(model):
    # Dense has 2 trainable weights; BatchNormalization has 2 trainable and 2 non-trainable ones.
    base = model.get_layer("base")
    set_trainable(base, "all", batch_norm=True)
    assert (len(model.get_layer("logits").trainable_weights), len(model.get_layer("logits").weights)) == (2, 2)
    norm = base.get_layer("inner").get_layer("inner_norm")
    assert (len(norm.trainable_weights), len(norm.non_trainable_weights)) == (2, 2)
    assert count_parameters(model) == [
        LayerGroup("base/block1", 112, 0),
        LayerGroup("base/inner", 8, 8),
        LayerGroup("base/block2", 10, 0),
        LayerGroup("head", 387, 0),
    ]
    set_trainable(base, "none")
    # Freezing a model freezes every nested layer.
    assert (len(norm.trainable_weights), len(norm.non_trainable_weights)) == (0, 4)
    assert [(group.trainable, group.frozen) for group in count_parameters(model)] == [
        (0, 112), (0, 16), (0, 10), (387, 0),
    ]  # fmt: skip


def test_frozen_variables_include_statistics_of_frozen_batch_norm(model):
    base = model.get_layer("base")
    set_trainable(base, "all", batch_norm=True)
    assert frozen_variables(model) == []
    set_trainable(base, "all")
    assert len(frozen_variables(model)) == 4  # gamma, beta and both moving statistics
    set_trainable(base, "none")
    assert len(frozen_variables(model)) == 8


def test_verify_frozen_unchanged_detects_a_one_bit_change(model):
    set_trainable(model.get_layer("base"), "all")
    before = hash_variables(frozen_variables(model))
    model.get_layer("logits").bias.assign(np.ones(3))
    verify_frozen_unchanged(model, before, "fine-tune")
    mean = model.get_layer("base").get_layer("inner").get_layer("inner_norm").moving_mean
    mean.assign(np.nextafter(keras.ops.convert_to_numpy(mean), np.float32(1)))
    with pytest.raises(RuntimeError, match=r"^fine-tune changed frozen weights or statistics"):
        verify_frozen_unchanged(model, before, "fine-tune")


def test_set_trainable_rejects_layers_that_do_not_exist(model):
    base = model.get_layer("base")
    with pytest.raises(
        DataError, match=r"requests the last 4 layers with weights, but the base has only 3\. Use at most 3"
    ):
        set_trainable(base, UnfreezeLayers(layers=4))
    with pytest.raises(DataError) as error:
        set_trainable(base, from_layer("block2_cnv"))
    assert str(error.value) == (
        "spec.fineTune.unfreeze.from is block2_cnv, but the base has no layer of that name. "
        "Did you mean block2_conv or block1_conv?"
    )


def test_only_trainable_batch_norm_is_synchronized(model):
    base = model.get_layer("base")
    norm = base.get_layer("inner").get_layer("inner_norm")
    set_trainable(base, "all")
    synchronize_batch_norm(model, synchronized=True)
    assert norm.synchronized is False
    set_trainable(base, "all", batch_norm=True)
    synchronize_batch_norm(model, synchronized=True)
    assert norm.synchronized is True


@pytest.fixture
def nested_model():
    """A base nested three levels deep; two of the models have a layer of the same name."""
    first_in = keras.Input((8, 8, 3))
    first = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(3, 1, name="low"), keras.layers.BatchNormalization(name="norm")],
        name="first",
    )
    middle = keras.Model(first_in, keras.layers.Conv2D(3, 1, name="same")(first(first_in)), name="middle")
    outer_in = keras.Input((8, 8, 3))
    last = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 1, name="same")], name="last")
    base = keras.Model(outer_in, last(middle(outer_in)), name="base")
    image = keras.Input((8, 8, 3), name="image")
    vector = keras.layers.Flatten(name="flatten")(base(image))
    return keras.Model(image, keras.layers.Dense(2, name="logits")(vector))


def trained_layer_paths(model):
    return [
        f"{path[-2]}/{path[-1]}"
        for path, layer in walk_layers(model.get_layer("base"), ("base",))
        if has_trainable_weights(layer)
    ]


def has_trainable_weights(layer):
    return not isinstance(layer, keras.Model) and bool(layer.trainable_variables)


@pytest.mark.parametrize(
    ("unfreeze", "expected"),
    [
        ("none", []),
        ("all", ["first/low", "middle/same", "last/same"]),
        (UnfreezeLayers(layers=1), ["last/same"]),
        (UnfreezeLayers(layers=2), ["middle/same", "last/same"]),
        # The batch normalization counts as a layer with weights, and stays frozen.
        (UnfreezeLayers(layers=3), ["middle/same", "last/same"]),
        (UnfreezeLayers(layers=4), ["first/low", "middle/same", "last/same"]),
        (from_layer("norm"), ["middle/same", "last/same"]),
        (from_layer("low"), ["first/low", "middle/same", "last/same"]),
        (from_layer("middle/same"), ["middle/same", "last/same"]),
        (from_layer("last"), ["last/same"]),
        (from_layer("middle/first/norm"), ["middle/same", "last/same"]),
    ],
)
def test_layers_of_nested_models_are_counted_and_named_like_others(nested_model, unfreeze, expected):
    set_trainable(nested_model.get_layer("base"), unfreeze)
    assert trained_layer_paths(nested_model) == expected
    norm = nested_model.get_layer("base").get_layer("middle").get_layer("first").get_layer("norm")
    assert (len(norm.trainable_weights), len(norm.non_trainable_weights)) == (0, 4)


def test_ambiguous_layer_name_is_rejected_with_all_paths(nested_model):
    with pytest.raises(DataError) as error:
        set_trainable(nested_model.get_layer("base"), from_layer("same"))
    assert str(error.value) == (
        "spec.fineTune.unfreeze.from is same, and the base has 2 layers of that name: middle/same and last/same. "
        "Use one of these paths."
    )


def test_layer_groups_of_a_nested_base_are_its_models(nested_model):
    set_trainable(nested_model.get_layer("base"), UnfreezeLayers(layers=2))
    assert count_parameters(nested_model) == [
        LayerGroup("base/middle", 12, 24),
        LayerGroup("base/last", 8, 0),
        LayerGroup("head", 258, 0),
    ]


def test_layer_groups_are_merged_in_a_base_with_hundreds_of_layers():
    pixels = maps = keras.Input((4, 4, 3))
    for index in range(130):
        maps = keras.layers.Conv2D(3, 1, name=f"layer{index}")(maps)
    base = keras.Model(pixels, maps, name="base")
    image = keras.Input((4, 4, 3))
    groups = count_parameters(keras.Model(image, keras.layers.Flatten()(base(image))))
    assert len(groups) == 33
    assert groups[0] == LayerGroup("base/layer0..layer3", 48, 0)


def test_trainable_takes_effect_at_the_next_compile(nested_model):
    images, labels = np.random.default_rng(0).random((4, 8, 8, 3)).astype(np.float32), np.array([0, 1, 0, 1])
    base, head = nested_model.get_layer("base"), nested_model.get_layer("logits")
    low = base.get_layer("middle").get_layer("first").get_layer("low")

    def train_and_compare(*layers):
        """Train for one epoch and return whether the weights of each layer changed."""
        before = [layer.get_weights() for layer in layers]
        nested_model.fit(images, labels, epochs=1, verbose=0)
        after = [layer.get_weights() for layer in layers]
        return [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    set_trainable(base, "none")
    nested_model.compile(optimizer=keras.optimizers.SGD(0.01), loss=loss)
    assert train_and_compare(low, head) == [False, True]
    set_trainable(base, "all")
    # Keras still uses the compiled training step.
    assert train_and_compare(low, head) == [False, True]
    nested_model.compile(optimizer=keras.optimizers.SGD(0.01), loss=loss)
    assert train_and_compare(low, head) == [True, True]


def test_batch_norm_stays_in_inference_mode_when_the_base_is_unfrozen(nested_model):
    images = np.random.default_rng(0).normal(5, 3, (8, 8, 8, 3)).astype(np.float32)
    norm = nested_model.get_layer("base").get_layer("middle").get_layer("first").get_layer("norm")
    for unfreeze in ("none", "all"):
        set_trainable(nested_model.get_layer("base"), unfreeze)
        nested_model.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        before = norm.get_weights()
        nested_model.fit(images, np.zeros(8), epochs=2, verbose=0)
        for expected, actual in zip(before, norm.get_weights(), strict=True):
            np.testing.assert_array_equal(actual, expected)
        np.testing.assert_array_equal(norm(images, training=True), norm(images, training=False))


def test_wrapped_batch_norm_stays_frozen():
    pixels = keras.Input((2, 4, 4, 3))
    base = keras.Model(pixels, keras.layers.TimeDistributed(keras.layers.BatchNormalization())(pixels), name="base")
    set_trainable(base, "all")
    assert base.trainable_variables == []
