"""Clones models, nested to any depth, for another image size or dtype policy, without sharing variables."""

from typing import Any

import keras

from topwork.model.weights import finalize_normalization

# Keras layers that augment images and whose names do not start with Random.
_AUGMENTATIONS = frozenset({"RandAugment", "AugMix", "MixUp", "CutMix"})


class ModelCloner:
    """Clones functional and sequential models in float32. Shared layers stay shared in the clone."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._models: dict[int, tuple[Any, keras.Model]] = {}

    def base(self, model: keras.Model, image: Any) -> keras.Model:
        """Clone a model for another input, without its weights.

        Args:
            model: Functional or sequential model with one input.
            image: KerasTensor (batch, height, width, channels), the input of the clone.

        Returns:
            The clone, named "base".

        Raises:
            ValueError: If the model does not support this input shape.
        """
        inputs = keras.tree.pack_sequence_as(as_functional(model).input, [image])
        copy = self._graph(model, inputs)
        return keras.Model(image, keras.tree.flatten(copy.output)[0], name="base")

    def copy_weights(self) -> None:
        """Copy the weights of every cloned layer.

        Raises:
            ValueError: If the weights of a layer have a different shape for the new input.
        """
        for layer, copy in self._copies.values():
            copy.set_weights(layer.get_weights())
            finalize_normalization(copy)

    def _graph(self, model: keras.Model, inputs: Any) -> keras.Model:
        return keras.models.clone_model(
            as_functional(model), input_tensors=inputs, call_function=self._call, clone_function=lambda layer: layer
        )

    def _call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, keras.Model):
            return self._nested(layer, args[0])(*args, **kwargs)
        if is_augmentation(layer):
            return args[0]
        return self._copy(layer)(*args, **kwargs)

    def _nested(self, model: keras.Model, inputs: Any) -> keras.Model:
        if id(model) not in self._models:
            new_inputs = keras.tree.map_structure(
                lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype), inputs
            )
            self._models[id(model)] = (model, self._graph(model, new_inputs))
        return self._models[id(model)][1]

    def _copy(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            copy = clone_layer(layer, "float32")
            if not isinstance(layer, keras.layers.Layer):
                return copy
            self._copies[id(layer)] = (layer, copy)
        return self._copies[id(layer)][1]


def as_functional(model: keras.Model) -> keras.Model:
    """Convert a sequential model to a functional one, because Keras exposes layer tensors only for those.

    Args:
        model: Functional or sequential model.

    Returns:
        A functional model with the same layers.
    """
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return model


def is_augmentation(layer: Any) -> bool:
    """Return whether a layer augments images in training and is the identity in inference."""
    return is_augmentation_name(type(layer).__name__)


def is_augmentation_name(kind: str) -> bool:
    """Return whether a class of layers augments images in training and is the identity in inference."""
    # RandomCrop changes the size in training and in inference.
    return (kind.startswith("Random") and kind != "RandomCrop") or kind in _AUGMENTATIONS


def clone_layer(layer: Any, policy: str) -> Any:
    """Clone a layer, without its weights, with another dtype policy.

    Args:
        layer: A layer, or an operation such as a flip, which has no dtype policy and is cloned unchanged.
        policy: Keras dtype policy.

    Returns:
        The clone.
    """
    config = layer.get_config()
    if isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.Model):
        config = _replace_policy({**config, "dtype": policy}, policy)
    return layer.__class__.from_config(config)


def _replace_policy(config: Any, policy: str) -> Any:
    """Replace the dtype policies in the config of a layer and of the layers it wraps."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return policy
        return {key: _replace_policy(value, policy) for key, value in config.items()}
    if isinstance(config, list):
        return [_replace_policy(value, policy) for value in config]
    return config
