"""Splits a classifier into a frozen part, which can run once per image, and a trainable part."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import keras

from topwork.model.layer_tree import leaf_layers


@dataclass(frozen=True)
class Partition:
    """A classifier, split below its first trainable layer. Both parts share the layers of the classifier.

    Attributes:
        frozen_part: From images float32 (batch, height, width, 3) in 0..255 to features.
        trainable_part: From features to logits.
    """

    frozen_part: keras.Model
    trainable_part: keras.Model

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of the features of one image."""
        return tuple(self.frozen_part.output_shape[1:])

    @property
    def multiplications(self) -> tuple[float, float]:
        """Multiplications of the frozen and of the trainable part in the forward pass of one image."""
        return count_multiplications(self.frozen_part), count_multiplications(self.trainable_part)

    def recombine(self) -> keras.Model:
        """Recombine both parts, with the frozen part always in inference mode.

        `fit` passes `training=True` to every layer (keras#20285), which would activate dropout and stochastic depth in
        a frozen base.
        """
        image = keras.Input(self.frozen_part.input_shape[1:], name="image")
        return keras.Model(
            image, self.trainable_part(InferenceOnly(self.frozen_part, name="frozen")(image)), name="classifier"
        )


class InferenceOnly(keras.layers.Layer):
    """Wraps a model and always calls it in inference mode."""

    def __init__(self, model: keras.Model, name: str) -> None:
        # float32 input: pixels up to 255 lose their last bits in half precision.
        super().__init__(name=name, dtype="float32", trainable=False)
        self.model = model

    def call(self, images: Any) -> Any:
        """Compute the output of the model.

        Args:
            images: Input of the wrapped model.
        """
        return self.model(images, training=False)


def partition_model(model: keras.Model) -> Partition | None:
    """Split a classifier as high as possible below its first trainable layer. Call this in the strategy scope.

    Args:
        model: Classifier, a chain of layers with a nested model "base". Its layers already have the `trainable`
            values of the stage.

    Returns:
        The partition, or None if no layer with weights is below the split.
    """
    base = model.get_layer("base")
    position = model.layers.index(base)
    head = model.layers[position + 1 :]
    if not base.trainable_weights:
        # Pooling shrinks the features and has no weights.
        pooled = head[0].name == "pooling"
        tensor = head[0].output if pooled else head[0].input
        frozen = keras.Model(model.inputs[0], tensor, name="frozen_part")
        return Partition(frozen, _trainable_part(frozen, head[pooled:])) if base.weights else None
    bottleneck = _bottleneck(base)
    if bottleneck is None:
        return None
    below = keras.Model(base.inputs[0], bottleneck, name="below")
    above = keras.Model(bottleneck, base.outputs[0], name="above")
    frozen = keras.Model(model.inputs[0], below(model.layers[position - 1].output), name="frozen_part")
    return Partition(frozen, _trainable_part(frozen, [above, *head]))


def count_multiplications(model: keras.Model) -> float:
    """Estimate the multiplications in the forward pass of one image: kernel size times output positions.

    Args:
        model: Any functional model.
    """
    total = 0.0
    for layer in leaf_layers(model):
        kernels = sum(prod(variable.shape) for variable in layer.weights if len(variable.shape) > 1)
        positions = prod(layer.output.shape[1:-1]) if kernels else 0
        total += kernels * positions
    return total


def _trainable_part(frozen: keras.Model, layers: list[Any]) -> keras.Model:
    features = keras.Input(frozen.output_shape[1:], name="features")
    outputs: Any = features
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(features, outputs, name="trainable_part")


def _bottleneck(base: keras.Model) -> Any:
    """Find the last tensor below the first trainable layer of a base that all paths go through."""
    layers = {layer.name: layer for layer in base.layers}
    # From input to output; a nested model is a single node.
    order = base.get_config()["layers"]
    last_use = {name: index for index, node in enumerate(order) for name in _input_layers(node["inbound_nodes"])}
    bottleneck, live, has_weights = None, set[str](), False
    for index, node in enumerate(order):
        # An operation such as a flip is not a layer.
        layer = layers.get(node["name"])
        if layer is not None and layer.trainable_weights:
            break
        has_weights |= layer is not None and bool(layer.weights)
        live = {name for name in (*live, node["name"]) if last_use.get(name, 0) > index}
        # A layer that is called twice has two outputs.
        if layer is not None and has_weights and live == {layer.name} and len(node["inbound_nodes"]) == 1:
            bottleneck = layer
    return bottleneck and bottleneck.output


def _input_layers(node: Any) -> Iterator[str]:
    """Yield the names of the layers whose outputs occur in the serialized arguments of a call."""
    if isinstance(node, dict) and node.get("class_name") == "__keras_tensor__":
        yield node["config"]["keras_history"][0]
    elif isinstance(node, dict | list | tuple):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _input_layers(inner)
