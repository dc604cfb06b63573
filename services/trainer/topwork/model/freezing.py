"""What is trained and what is kept: freezing, unfreezing, counting, and the proof that the kept did not change."""

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import keras

from topwork.errors import DataError
from topwork.model.layer_groups import blocks
from topwork.model.layer_tree import find, leaves
from topwork.spec.training import UnfreezeFrom, UnfreezeLayers

__all__ = ["LayerGroup", "Unfrozen", "audit", "digest", "frozen_variables", "leaves", "parameter_groups", "unfreeze"]

Unfrozen = Literal["all", "none"] | UnfreezeLayers | UnfreezeFrom


@dataclass(frozen=True)
class LayerGroup:
    """Parameters of the layers that belong together."""

    name: str
    trainable: int
    frozen: int


def unfreeze(base: keras.Model, what: Unfrozen, *, batch_norm: bool = False) -> None:
    """Set which layers of the base are trained; it counts from the next compile on.

    Args:
        base: The base of a classifier.
        what: "none", "all", the last layers with weights counted from the top, or a layer and all above it. Layers
            of nested models count and are named like those of the base itself; a nested model's name stands for its
            first layer.
        batch_norm: Whether batch normalization is trained too. A pretrained one stays in inference mode: small batches
            would erase its statistics, and `training=False` at the call does not hold in `fit` (keras#20285).

    Raises:
        DataError: If the base has no such layer, or fewer layers than asked for.
    """
    chosen = {id(layer) for layer in _chosen(base, what)}
    # The containers first: Keras hands a container's `trainable` down to every layer in it.
    base.trainable = what != "none"
    for layer in leaves(base):
        layer.trainable = id(layer) in chosen and (batch_norm or not _is_batch_norm(layer))


def _is_batch_norm(layer: Any) -> bool:
    while isinstance(layer, keras.layers.Wrapper):
        layer = layer.layer
    return isinstance(layer, keras.layers.BatchNormalization)


def _chosen(base: keras.Model, what: Unfrozen) -> list[Any]:
    layers = list(leaves(base))
    if what == "all":
        return layers
    if isinstance(what, UnfreezeLayers):
        with_weights = [layer for layer in layers if layer.weights]
        if what.layers > len(with_weights):
            raise DataError(
                f"spec.fineTune.unfreeze asks for the last {what.layers} layers with weights, but the base has "
                f"{len(with_weights)}. Use {len(with_weights)} at most, or unfreeze: all."
            )
        return layers[layers.index(with_weights[-what.layers]) :]
    if isinstance(what, UnfreezeFrom):
        _, first = find(base, what.from_layer, "spec.fineTune.unfreeze.from", "the base")
        return layers[layers.index(next(leaves(first))) :]
    return []


def synchronize_batch_norm(model: keras.Model, synchronized: bool) -> None:
    """Make the batch normalizations that are trained share their statistics between the replicas, or stop it.

    Without it each replica has its own and only the first one's are saved.
    """
    for layer in leaves(model):
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
            layer.synchronized = synchronized


def frozen_variables(model: keras.Model) -> list[Any]:
    """List the variables that training must not change: weights of frozen layers and the statistics in them.

    States of random generators and the statistics of a batch normalization that is trained may move.
    """
    trainable = {id(variable) for variable in model.trainable_variables}
    return [
        variable
        for layer in leaves(model)
        for variable in layer.weights
        if id(variable) not in trainable and not (_is_batch_norm(layer) and layer.trainable)
    ]


def digest(variables: list[Any]) -> str:
    """Hash the values of variables.

    Returns:
        SHA-256, in hex, over dtype, shape and bytes of each in order.
    """
    total = hashlib.sha256()
    for variable in variables:
        value = keras.ops.convert_to_numpy(variable)
        total.update(f"{value.dtype}{value.shape}".encode())
        total.update(value.tobytes())
    return total.hexdigest()


def audit(model: keras.Model, before: str, stage: str) -> None:
    """Prove that the frozen variables are bit-identical to what they were.

    Raises:
        RuntimeError: If they changed, which is a bug.
    """
    if digest(frozen_variables(model)) != before:
        raise RuntimeError(f"{stage} changed weights or statistics that are frozen. This is a bug in topwork.")


def parameter_groups(model: keras.Model) -> list[LayerGroup]:
    """Count the trainable and frozen parameters of the blocks of the base and of the head.

    Args:
        model: Classifier whose base is nested and named "base".

    Returns:
        One group for each block of the base, from input to output, and one for the head.
    """
    base = model.get_layer("base")
    groups = [(layer, f"base/{block}") for layer, block in blocks(base)]
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
