"""A model that somebody saved, cut below its head: it becomes the base of a new classifier."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError
from topwork.model.cloning import Copier, as_functional
from topwork.model.layer_tree import LayerPath, find, walk
from topwork.model.safe_loading import open_model

KEY = "spec.model.base.saved.cutAt"


def cut(path: Path, cut_at: str | int | None, image_size: tuple[int, int]) -> keras.Model:
    """Load a saved model and keep everything from its input to one of its layers.

    The file stays as it is, and the base shares no variable with what was loaded. Code in the file is never run.
    Layers that augment images are left out: `spec.augmentation` says what is done to them.

    Args:
        path: `.keras` file, or legacy `.h5`.
        cut_at: Last layer that is kept: its name, `outer/inner` where several nested models have one of that name, or
            its index in `model.layers`. None keeps the nested "base" of a model of topwork, else everything below the
            last layer with weights, however deep that is nested. Of a layer that is called several times, the last
            call counts.
        image_size: Height and width in pixels of the images that the base will see.

    Returns:
        The base, named "base", in float32.

    Raises:
        DataError: If the file is no such model, holds code, takes other images, or has no such layer.
    """
    model = open_model(path)
    _check_input(model, path)
    kept = _kept(model, _place(model, cut_at, path))
    if len(keras.tree.flatten(kept.output)) != 1 or not kept.weights:
        what = "several tensors" if kept.weights else "no layer with weights"
        raise DataError(f"{KEY} is {cut_at}, and {path.name} up to there gives {what}. Name another layer.")
    copier = Copier()
    try:
        base = copier.base(kept, keras.Input((*image_size, 3), name="pixels"))
        copier.copy_weights()
    except ValueError as error:
        raise DataError(_size_refusal(model, path, image_size, error)) from error
    base.trainable = True
    return base


@dataclass(frozen=True)
class _Place:
    """Where a model is cut: above a layer, or below it."""

    path: LayerPath
    below: bool = False


def _place(model: keras.Model, cut_at: str | int | None, path: Path) -> _Place:
    if isinstance(cut_at, str):
        return _Place(find(model, cut_at, KEY, path.name)[0])
    if cut_at is not None:
        if not -len(model.layers) <= cut_at < len(model.layers):
            raise DataError(
                f"{KEY} is {cut_at}, but {path.name} has {len(model.layers)} layers: an index "
                f"lies between {-len(model.layers)} and {len(model.layers) - 1}."
            )
        return _Place((str(model.layers[cut_at].name),))
    layers = list(walk(model))
    if any(where == ("base",) and isinstance(layer, keras.Model) for where, layer in layers):
        return _Place(("base",))
    with_weights = [where for where, layer in layers if layer.weights and not isinstance(layer, keras.Model)]
    if not with_weights:
        raise DataError(f"{path.name} has no layer with weights: there's nothing to keep.")
    return _Place(with_weights[-1], below=True)


def _kept(model: keras.Model, place: _Place) -> keras.Model:
    """Take the part of a model up to a place, with the model's own layers."""
    graph = as_functional(model)
    into: dict[str, Any] = {}
    out: dict[str, Any] = {}

    def traced(layer: Any, *args: Any, **kwargs: Any) -> Any:
        into[layer.name], out[layer.name] = args[0], layer(*args, **kwargs)
        return out[layer.name]

    images = keras.tree.map_structure(lambda tensor: keras.Input(batch_shape=tensor.shape), graph.input)
    keras.models.clone_model(graph, input_tensors=images, call_function=traced, clone_function=lambda layer: layer)
    first, *rest = place.path
    if first not in out:
        # Inputs are no calls.
        return keras.Model(images, images, name=model.name)
    if rest:
        inner = _kept(model.get_layer(first), _Place(tuple(rest), place.below))
        return keras.Model(images, inner(into[first]), name=model.name)
    return keras.Model(images, into[first] if place.below else out[first], name=model.name)


def _check_input(model: keras.Model, path: Path) -> None:
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or model.inputs[0].shape[-1] != 3:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in model.inputs)
        raise DataError(f"{path.name} takes {shapes}: a base takes one batch of RGB images, (batch, height, width, 3).")


def _size_refusal(model: keras.Model, path: Path, image_size: tuple[int, int], error: Exception) -> str:
    height, width = model.inputs[0].shape[1:3]
    if (height, width) == tuple(image_size) or height is None:
        return f"{path.name} can't be rebuilt as a base for images of {image_size[0]}x{image_size[1]}: {error}"
    return (
        f"{path.name} was made for images of {height}x{width}, and can't take spec.dataset.imageSize "
        f"[{image_size[0]}, {image_size[1]}]. Use [{height}, {width}]."
    )
