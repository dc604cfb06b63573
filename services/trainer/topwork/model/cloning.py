"""Copies of models: for another image size or number format, with models nested at any depth, sharing nothing."""

from typing import Any

import keras

from topwork.model.weights import finalize

# Layers that change images at random while a model is trained; those of Keras that are not named Random….
_AUGMENTATIONS = frozenset({"RandAugment", "AugMix", "MixUp", "CutMix"})


class Copier:
    """Copies functional and sequential models in float32; a layer that is shared stays shared in the copy."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Any, Any]] = {}
        self._models: dict[int, tuple[Any, keras.Model]] = {}

    def base(self, model: keras.Model, image: Any) -> keras.Model:
        """Copy a model for other images, still without its weights.

        Args:
            model: Functional or sequential model with one input.
            image: KerasTensor (batch, height, width, channels) that the copy begins with.

        Returns:
            The copy, named "base".

        Raises:
            ValueError: If the model can't take such images.
        """
        inputs = keras.tree.pack_sequence_as(as_functional(model).input, [image])
        copy = self._graph(model, inputs)
        return keras.Model(image, keras.tree.flatten(copy.output)[0], name="base")

    def copy_weights(self) -> None:
        """Give every copy the weights of its layer.

        Raises:
            ValueError: If the weights of a layer have another shape for the new images.
        """
        for layer, copy in self._copies.values():
            copy.set_weights(layer.get_weights())
            finalize(copy)

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
            fresh = keras.tree.map_structure(
                lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype), inputs
            )
            self._models[id(model)] = (model, self._graph(model, fresh))
        return self._models[id(model)][1]

    def _copy(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            copy = with_dtype(layer, "float32")
            if not isinstance(layer, keras.layers.Layer):
                return copy
            self._copies[id(layer)] = (layer, copy)
        return self._copies[id(layer)][1]


def as_functional(model: keras.Model) -> keras.Model:
    """See a sequential model as a functional one: Keras hands out the tensors of layers for these alone.

    Args:
        model: Functional or sequential model.

    Returns:
        A functional model of the same layers.
    """
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return model


def is_augmentation(layer: Any) -> bool:
    """Say whether a layer changes images at random in training, and not at all otherwise."""
    kind = type(layer).__name__
    # RandomCrop changes the size, in training and otherwise.
    return (kind.startswith("Random") and kind != "RandomCrop") or kind in _AUGMENTATIONS


def with_dtype(layer: Any, policy: str) -> Any:
    """Copy a layer without its weights into a number format.

    Args:
        layer: A layer, or an operation such as a flip, which has no format of its own and is copied as it is.
        policy: Keras dtype policy.

    Returns:
        The copy.
    """
    config = layer.get_config()
    if isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.Model):
        config = _in_format({**config, "dtype": policy}, policy)
    return layer.__class__.from_config(config)


def _in_format(config: Any, policy: str) -> Any:
    """Change the number formats in a configuration: of a layer, and of those that it wraps."""
    if isinstance(config, dict):
        if config.get("class_name") == "DTypePolicy":
            return policy
        return {key: _in_format(value, policy) for key, value in config.items()}
    if isinstance(config, list):
        return [_in_format(value, policy) for value in config]
    return config
