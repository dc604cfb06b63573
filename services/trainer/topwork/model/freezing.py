"""Freezes and unfreezes layers, counts their parameters, and verifies that frozen weights did not change."""

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import keras

from topwork.errors import DataError
from topwork.model.layer_groups import name_layer_groups
from topwork.model.layer_tree import find_layer, leaf_layers
from topwork.spec.fine_tune import UnfreezeFrom, UnfreezeLayers

UnfreezeSetting = Literal["all", "none"] | UnfreezeLayers | UnfreezeFrom


@dataclass(frozen=True)
class LayerGroup:
    """Parameter counts of a group of layers.

    Attributes:
        name: `base/<block>` or `head`.
        trainable: Number of trainable parameters.
        frozen: Number of frozen parameters.
    """

    name: str
    trainable: int
    frozen: int


def set_trainable(base: keras.Model, unfrozen: UnfreezeSetting, *, batch_norm: bool = False) -> None:
    """Set which layers of the base are trainable. Takes effect at the next `compile`.

    Args:
        base: The base of a classifier.
        unfrozen: "none", "all", the last n layers with weights, or a layer and all layers above it. Layers of nested
            models are counted and named like layers of the base; the name of a nested model refers to its first layer.
        batch_norm: Whether BatchNormalization layers are trainable too. With pretrained weights they must stay in
            inference mode: small batches would destroy their moving statistics, and `training=False` at the call
            has no effect in `fit` (keras#20285).

    Raises:
        DataError: If the base has no such layer, or fewer layers than requested.
    """
    selected = {id(layer) for layer in _select_layers(base, unfrozen)}
    # Set the model first: Keras propagates its `trainable` to every layer in it.
    base.trainable = unfrozen != "none"
    for layer in leaf_layers(base):
        layer.trainable = id(layer) in selected and (batch_norm or not _is_batch_norm(layer))


def _is_batch_norm(layer: Any) -> bool:
    while isinstance(layer, keras.layers.Wrapper):
        layer = layer.layer
    return isinstance(layer, keras.layers.BatchNormalization)


def _select_layers(base: keras.Model, unfrozen: UnfreezeSetting) -> list[Any]:
    layers = list(leaf_layers(base))
    if unfrozen == "all":
        return layers
    if isinstance(unfrozen, UnfreezeLayers):
        with_weights = [layer for layer in layers if layer.weights]
        if unfrozen.layers > len(with_weights):
            raise DataError(
                f"spec.fineTune.unfreeze requests the last {unfrozen.layers} layers with weights, but the base has "
                f"only {len(with_weights)}. Use at most {len(with_weights)}, or unfreeze: all."
            )
        return layers[layers.index(with_weights[-unfrozen.layers]) :]
    if isinstance(unfrozen, UnfreezeFrom):
        _, first = find_layer(base, unfrozen.from_layer, "spec.fineTune.unfreeze.from", "the base")
        return layers[layers.index(next(leaf_layers(first))) :]
    return []


def synchronize_batch_norm(model: keras.Model, synchronized: bool) -> None:
    """Turn synchronization of trainable BatchNormalization layers across replicas on or off.

    Without it, each replica keeps its own moving statistics, and only those of the first replica are saved.
    """
    for layer in leaf_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            layer.synchronized = synchronized


def frozen_variables(model: keras.Model) -> list[Any]:
    """List the variables that training must not change: weights and moving statistics of frozen layers.

    The states of random generators and the moving statistics of trainable BatchNormalization layers may change.
    """
    trainable = {id(variable) for variable in model.trainable_variables}
    return [
        variable
        for layer in leaf_layers(model)
        for variable in layer.weights
        if id(variable) not in trainable and not (_is_batch_norm(layer) and layer.trainable)
    ]


def hash_variables(variables: list[Any]) -> str:
    """Hash the values of variables.

    Returns:
        Hexadecimal SHA-256 over the dtype, shape and bytes of each variable, in order.
    """
    total = hashlib.sha256()
    for variable in variables:
        value = keras.ops.convert_to_numpy(variable)
        total.update(f"{value.dtype}{value.shape}".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def verify_frozen_unchanged(model: keras.Model, before: str, stage: str) -> None:
    """Verify that the frozen variables are bit-identical to their values before training.

    Args:
        model: The model after training.
        before: `hash_variables(frozen_variables(model))` before training.
        stage: Name of the stage, for the error message.

    Raises:
        RuntimeError: If they changed, which is a bug.
    """
    if hash_variables(frozen_variables(model)) != before:
        raise RuntimeError(f"{stage} changed frozen weights or statistics. This is a bug in topwork.")


def count_parameters(model: keras.Model) -> list[LayerGroup]:
    """Count the trainable and frozen parameters of each block of the base and of the head.

    Args:
        model: Classifier with a nested model named "base".

    Returns:
        One group per block of the base, from input to output, and one for the head.
    """
    base = model.get_layer("base")
    groups = [(layer, f"base/{block}") for layer, block in name_layer_groups(base)]
    groups += [(layer, "head") for layer in model.layers if layer is not base]
    counts: dict[str, list[int]] = {}
    seen: set[int] = set()
    for layer, group in groups:
        trainable = {id(variable) for variable in layer.trainable_variables}
        for variable in layer.weights:
            if id(variable) not in seen:
                seen.add(id(variable))
                counts.setdefault(group, [0, 0])[id(variable) not in trainable] += prod(variable.shape)
    return [LayerGroup(name, trainable, frozen) for name, (trainable, frozen) in counts.items()]
