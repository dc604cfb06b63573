"""`trainable`: what freezing and unfreezing a model does to its layers, counts and digests."""

import keras
import numpy as np
import pytest

from topwork.errors import DataError
from topwork.model.freezing import (
    LayerGroup,
    audit,
    digest,
    frozen_variables,
    parameter_groups,
    synchronize_batch_norm,
    unfreeze,
)
from topwork.spec.training import UnfreezeFrom, UnfreezeLayers


@pytest.fixture
def model():
    """A classifier whose base holds a nested model, as a base of a base does."""
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


def trained(model):
    return sorted({variable.path.split("/")[-2] for variable in model.trainable_variables})


@pytest.mark.parametrize(
    ("what", "batch_norm", "expected"),
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
def test_unfreezing_trains_what_is_asked_for_whatever_was_before(model, what, batch_norm, expected):
    base = model.get_layer("base")
    for before in ("all", "none"):
        unfreeze(base, before, batch_norm=True)
        unfreeze(base, what, batch_norm=batch_norm)
        assert trained(model) == expected


def test_counts_are_those_of_keras(model):
    # Dense has 2 trainable weights, BatchNormalization 2 and 2 that are never trained.
    base = model.get_layer("base")
    unfreeze(base, "all", batch_norm=True)
    assert (len(model.get_layer("logits").trainable_weights), len(model.get_layer("logits").weights)) == (2, 2)
    norm = base.get_layer("inner").get_layer("inner_norm")
    assert (len(norm.trainable_weights), len(norm.non_trainable_weights)) == (2, 2)
    assert parameter_groups(model) == [
        LayerGroup("base/block1", 112, 0),
        LayerGroup("base/other", 8, 8),
        LayerGroup("base/block2", 10, 0),
        LayerGroup("head", 387, 0),
    ]
    unfreeze(base, "none")
    # Freezing a model freezes every nested layer.
    assert (len(norm.trainable_weights), len(norm.non_trainable_weights)) == (0, 4)
    assert [(group.trainable, group.frozen) for group in parameter_groups(model)] == [
        (0, 112), (0, 16), (0, 10), (387, 0),
    ]  # fmt: skip


def test_frozen_variables_are_those_that_training_must_not_move(model):
    base = model.get_layer("base")
    unfreeze(base, "all", batch_norm=True)
    assert frozen_variables(model) == []
    unfreeze(base, "all")
    assert len(frozen_variables(model)) == 4  # scale, offset and both statistics of the normalization
    unfreeze(base, "none")
    assert len(frozen_variables(model)) == 8


def test_an_audit_sees_a_change_of_one_bit(model):
    unfreeze(model.get_layer("base"), "all")
    before = digest(frozen_variables(model))
    model.get_layer("logits").bias.assign(np.ones(3))
    audit(model, before, "fine-tune")
    mean = model.get_layer("base").get_layer("inner").get_layer("inner_norm").moving_mean
    mean.assign(np.nextafter(keras.ops.convert_to_numpy(mean), np.float32(1)))
    with pytest.raises(RuntimeError, match=r"^fine-tune changed weights or statistics that are frozen"):
        audit(model, before, "fine-tune")


def test_layers_that_are_not_there_are_refused(model):
    base = model.get_layer("base")
    with pytest.raises(DataError, match=r"asks for the last 4 layers with weights, but the base has 3\. Use 3 at most"):
        unfreeze(base, UnfreezeLayers(layers=4))
    with pytest.raises(DataError) as error:
        unfreeze(base, UnfreezeFrom.model_validate({"from": "block2_cnv"}))
    assert str(error.value) == (
        "spec.fineTune.unfreeze.from is block2_cnv, but the base has no layer of that name. "
        "Did you mean block2_conv or block1_conv?"
    )


def test_only_a_normalization_that_is_trained_shares_its_statistics(model):
    base = model.get_layer("base")
    norm = base.get_layer("inner").get_layer("inner_norm")
    unfreeze(base, "all")
    synchronize_batch_norm(model, synchronized=True)
    assert norm.synchronized is False
    unfreeze(base, "all", batch_norm=True)
    synchronize_batch_norm(model, synchronized=True)
    assert norm.synchronized is True
