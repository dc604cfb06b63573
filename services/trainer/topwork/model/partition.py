"""A classifier in two halves: the lower one frozen, the upper one trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import keras

from topwork.model.freezing import leaves


@dataclass(frozen=True)
class Halves:
    """A classifier cut where everything that is trained lies above; all layers are those of the classifier.

    Attributes:
        lower: From images float32 (batch, height, width, 3) in 0..255 to the features that the upper half takes.
        upper: From the features to logits.
    """

    lower: keras.Model
    upper: keras.Model

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of the features of one image."""
        return tuple(self.lower.output_shape[1:])

    @property
    def work(self) -> tuple[float, float]:
        """Multiplications of the lower and of the upper half for one image, forward."""
        return multiplications(self.lower), multiplications(self.upper)

    def joined(self) -> keras.Model:
        """Put both together again, the lower half in inference mode whatever is trained above it.

        Keras hands `training=True` of a `fit` down to every layer (keras#20285): dropout and stochastic depth of a
        frozen base would be active.
        """
        image = keras.Input(self.lower.input_shape[1:], name="image")
        return keras.Model(image, self.upper(Frozen(self.lower, name="frozen")(image)), name="classifier")


class Frozen(keras.layers.Layer):
    """Calls a model in inference mode only."""

    def __init__(self, model: keras.Model, name: str) -> None:
        # float32 at the door: pixels up to 255 lose their last bits in half precision.
        super().__init__(name=name, dtype="float32", trainable=False)
        self.model = model

    def call(self, images: Any) -> Any:
        """Give the model's output.

        Args:
            images: As the model takes them.
        """
        return self.model(images, training=False)


def halves(model: keras.Model) -> Halves | None:
    """Cut a classifier as high as possible below all that is trained; call it in the scope of the strategy.

    Args:
        model: Classifier, a chain of layers with a nested model "base"; its layers are frozen or not as they will be
            trained.

    Returns:
        Both halves; None where no layer with weights could stay below the cut.
    """
    base = model.get_layer("base")
    position = model.layers.index(base)
    head = model.layers[position + 1 :]
    if not base.trainable_weights:
        # Pooling makes features small, and has nothing to learn.
        pooled = head[0].name == "pooling"
        tensor = head[0].output if pooled else head[0].input
        lower = keras.Model(model.inputs[0], tensor, name="lower")
        return Halves(lower, _chain(lower, head[pooled:])) if base.weights else None
    bottleneck = _bottleneck(base)
    if bottleneck is None:
        return None
    below = keras.Model(base.inputs[0], bottleneck, name="below")
    above = keras.Model(bottleneck, base.outputs[0], name="above")
    lower = keras.Model(model.inputs[0], below(model.layers[position - 1].output), name="lower")
    return Halves(lower, _chain(lower, [above, *head]))


def multiplications(model: keras.Model) -> float:
    """Estimate the multiplications of a model for one image: those of its kernels, at each place they are applied."""
    total = 0.0
    for layer in leaves(model):
        kernels = sum(prod(variable.shape) for variable in layer.weights if len(variable.shape) > 1)
        places = prod(layer.output.shape[1:-1]) if kernels else 0
        total += kernels * places
    return total


def _chain(lower: keras.Model, layers: list[Any]) -> keras.Model:
    features = keras.Input(lower.output_shape[1:], name="features")
    outputs: Any = features
    for layer in layers:
        outputs = layer(outputs)
    return keras.Model(features, outputs, name="upper")


def _bottleneck(base: keras.Model) -> Any:
    """Find the highest tensor of a base below all its trained layers through which every path goes."""
    layers = {layer.name: layer for layer in base.layers}
    # From input to output; of a nested model only what goes in and out.
    order = base.get_config()["layers"]
    last_use = {name: index for index, node in enumerate(order) for name in _sources(node["inbound_nodes"])}
    found, waiting, has_weights = None, set[str](), False
    for index, node in enumerate(order):
        # An operation such as a flip is no layer.
        layer = layers.get(node["name"])
        if layer is not None and layer.trainable_weights:
            break
        has_weights |= layer is not None and bool(layer.weights)
        waiting = {name for name in (*waiting, node["name"]) if last_use.get(name, 0) > index}
        # A layer that is called twice has two outputs.
        if layer is not None and has_weights and waiting == {layer.name} and len(node["inbound_nodes"]) == 1:
            found = layer
    return found and found.output


def _sources(node: Any) -> Iterator[str]:
    """Name the layers whose outputs stand somewhere in the serialized arguments of a call."""
    if isinstance(node, dict) and node.get("class_name") == "__keras_tensor__":
        yield node["config"]["keras_history"][0]
    elif isinstance(node, dict | list | tuple):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from _sources(inner)
