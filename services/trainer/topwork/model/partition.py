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
    below, above = split_after(base, bottleneck)
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


def split_after(
    model: keras.Model, layer: Any, parts: tuple[keras.Model, keras.Model] | None = None
) -> tuple[keras.Model, keras.Model]:
    """Split a model after a layer that all paths go through, or inside of it. Both parts share its layers.

    Args:
        model: A functional model.
        layer: One of its layers.
        parts: Both parts of this layer, if it is a nested model to split inside of.

    Returns:
        The part from the input of the model to the split, and the part from there to its output.
    """
    if not isinstance(layer, keras.Model):
        below = keras.Model(model.inputs[0], layer.output, name="below")
        return below, keras.Model(layer.output, model.outputs[0], name="above")
    # A nested model does not know its output in the graph around it, so that graph is traced again.
    lower, upper = parts or (layer, None)
    split: list[Any] = []

    def call(called: Any, *args: Any, **kwargs: Any) -> Any:
        if called is not layer:
            return called(*args, **kwargs)
        split.append(lower(args[0]))
        return upper(split[0]) if upper else split[0]

    inputs = keras.Input(batch_shape=model.inputs[0].shape)
    traced = keras.models.clone_model(
        model, input_tensors=inputs, call_function=call, clone_function=lambda layer: layer
    )
    return keras.Model(inputs, split[0], name="below"), keras.Model(split[0], traced.outputs[0], name="above")


def _bottleneck(base: keras.Model) -> Any:
    """Find the last layer below the first trainable layer of a base that all paths go through."""
    bottleneck, has_weights = None, False
    for layer, is_bottleneck in trace_paths(base):
        if layer.trainable_weights:
            break
        has_weights |= bool(layer.weights)
        if has_weights and is_bottleneck:
            bottleneck = layer
    return bottleneck


def trace_paths(model: keras.Model) -> Iterator[tuple[Any, bool]]:
    """Iterate over the layers of a model from input to output; a nested model is one of them.

    Args:
        model: A functional model.

    Yields:
        The layer, and whether all paths to the output of the model go through the only output of this layer. False for
        the last layer, whose output is that of the model.
    """
    layers = {layer.name: layer for layer in model.layers}
    order = model.get_config()["layers"]
    last_use = {name: index for index, node in enumerate(order) for name in _input_layers(node["inbound_nodes"])}
    live = set[str]()
    for index, node in enumerate(order):
        live = {name for name in (*live, node["name"]) if last_use.get(name, 0) > index}
        # An operation such as a flip is not a layer.
        if (layer := layers.get(node["name"])) is not None:
            # A layer that is called twice has two outputs.
            is_only_path = live == {layer.name} and len(node["inbound_nodes"]) == 1
            yield layer, is_only_path and len(keras.tree.flatten(layer.output)) == 1


def _input_layers(node: Any) -> Iterator[str]:
    """Yield the names of the layers whose outputs occur in the serialized arguments of a call."""
    if isinstance(node, dict) and node.get("class_name") == "__keras_tensor__":
        yield node["config"]["keras_history"][0]
    elif isinstance(node, dict | list | tuple):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _input_layers(inner)
