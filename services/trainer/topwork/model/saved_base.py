"""Turns a saved Keras model into a base: loads it, cuts off its head, and clones the rest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError, quote_error
from topwork.model.cloning import ModelCloner, as_functional
from topwork.model.layer_tree import LayerPath, find_layer, walk_layers
from topwork.model.safe_loading import load_model_safely

KEY = "spec.model.base.saved.cutAt"


def load_saved_base(path: Path, cut_at: str | int | None, image_size: tuple[int, int]) -> keras.Model:
    """Load a saved model and keep everything from its input to one of its layers.

    The file is not modified, and code in it is never run. Augmentation layers are removed, because
    `spec.augmentation` replaces them.

    Args:
        path: `.keras` file, or legacy `.h5` file.
        cut_at: Last layer to keep: its name, its path `outer/inner` if several nested models have a layer of that
            name, or its index in `model.layers`. None keeps the nested "base" of a model trained by topwork, or else
            everything below the last layer with weights, at any nesting depth. If a layer is called several times,
            the last call counts.
        image_size: Height and width of the images in pixels.

    Returns:
        The base, named "base", in float32.

    Raises:
        DataError: If the file is not a Keras model, contains code, expects different input, or has no such layer.
    """
    model = load_model_safely(path)
    _check_input(model, path)
    truncated = _truncate(model, _find_cut_point(model, cut_at, path))
    if len(keras.tree.flatten(truncated.output)) != 1 or not truncated.weights:
        content = "several tensors" if truncated.weights else "no layer with weights"
        raise DataError(f"{KEY} is {cut_at}, but {path.name} up to that layer has {content}. Choose another layer.")
    cloner = ModelCloner()
    try:
        base = cloner.base(truncated, keras.Input((*image_size, 3), name="pixels"))
        cloner.copy_weights()
    except ValueError as error:
        raise DataError(_size_error(model, path, image_size, error)) from error
    base.trainable = True
    return base


@dataclass(frozen=True)
class _CutPoint:
    """Where to cut a model.

    Attributes:
        path: Path of a layer.
        below: Whether to cut below that layer instead of above it.
    """

    path: LayerPath
    below: bool = False


def _find_cut_point(model: keras.Model, cut_at: str | int | None, path: Path) -> _CutPoint:
    if isinstance(cut_at, str):
        return _CutPoint(find_layer(model, cut_at, KEY, path.name)[0])
    if cut_at is not None:
        if not -len(model.layers) <= cut_at < len(model.layers):
            raise DataError(
                f"{KEY} is {cut_at}, but {path.name} has {len(model.layers)} layers. Use an index "
                f"between {-len(model.layers)} and {len(model.layers) - 1}."
            )
        return _CutPoint((str(model.layers[cut_at].name),))
    layers = list(walk_layers(model))
    if any(layer_path == ("base",) and isinstance(layer, keras.Model) for layer_path, layer in layers):
        return _CutPoint(("base",))
    with_weights = [layer_path for layer_path, layer in layers if layer.weights and not isinstance(layer, keras.Model)]
    if not with_weights:
        raise DataError(f"{path.name} has no layer with weights, so there is nothing to keep.")
    return _CutPoint(with_weights[-1], below=True)


def _truncate(model: keras.Model, point: _CutPoint) -> keras.Model:
    """Return the part of a model up to the cut point; it shares the layers of the model."""
    graph = as_functional(model)
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}

    def record_call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        inputs[layer.name], outputs[layer.name] = args[0], layer(*args, **kwargs)
        return outputs[layer.name]

    images = keras.tree.map_structure(lambda tensor: keras.Input(batch_shape=tensor.shape), graph.input)
    keras.models.clone_model(graph, input_tensors=images, call_function=record_call, clone_function=lambda layer: layer)
    first, *rest = point.path
    if first not in outputs:
        # The cut point is an input, which is never called.
        return keras.Model(images, images, name=model.name)
    if rest:
        inner = _truncate(model.get_layer(first), _CutPoint(tuple(rest), point.below))
        return keras.Model(images, inner(inputs[first]), name=model.name)
    return keras.Model(images, inputs[first] if point.below else outputs[first], name=model.name)


def _check_input(model: keras.Model, path: Path) -> None:
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or model.inputs[0].shape[-1] != 3:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in model.inputs[:3])
        more = f" and {len(model.inputs) - 3} more" if len(model.inputs) > 3 else ""
        raise DataError(
            f"{path.name} expects input of shape {shapes}{more}, but a base takes one batch of RGB images, "
            "(batch, height, width, 3)."
        )


def _size_error(model: keras.Model, path: Path, image_size: tuple[int, int], error: Exception) -> str:
    height, width = model.inputs[0].shape[1:3]
    if (height, width) == tuple(image_size) or height is None:
        size = f"{image_size[0]}x{image_size[1]}"
        return f"{path.name} cannot be rebuilt as a base for images of {size}: {quote_error(error)}"
    return (
        f"{path.name} was built for images of {height}x{width} and does not support spec.dataset.imageSize "
        f"[{image_size[0]}, {image_size[1]}]. Use [{height}, {width}]."
    )
