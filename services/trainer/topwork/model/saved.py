"""A model that somebody saved, cut below its head: it becomes the base of a new classifier."""

import json
import zipfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError


def cut(path: Path, cut_at: str | int | None, image_size: tuple[int, int]) -> keras.Model:
    """Load a saved model and keep everything from its input to one of its layers.

    The file stays as it is, and the base shares no variable with what was loaded. Code in the file is never run.

    Args:
        path: `.keras` file, or legacy `.h5`.
        cut_at: Last layer that is kept, by its name (one of a nested model too) or its index in `model.layers`. None
            keeps the nested "base" of a model of topwork, else everything below the last layer with weights.
        image_size: Height and width in pixels of the images that the base will see.

    Returns:
        The base, named "base", in float32.

    Raises:
        DataError: If the file is no such model, holds code, takes other images, or has no such layer.
    """
    model = _load(path)
    _check_input(model, path)
    name = _layer_name(model, cut_at, path)
    image = keras.Input((*image_size, 3), name="pixels")
    try:
        copy, ends = _clone(model, image)
        output = ends.input_of(_last_with_weights(model, path)) if name is None else ends.output_of(name)
        base = keras.Model(copy.inputs, output, name="base")
        # Layer by layer: above the cut, a layer of another image size may not fit and isn't needed.
        for layer in ends.layers_of(base):
            layer.set_weights(model.get_layer(layer.name).get_weights())
    except ValueError as error:
        raise DataError(_size_refusal(model, path, image_size, error)) from error
    base.trainable = True
    return base


class _Ends:
    """Inputs and outputs of the layers of a model, by name, as its copy is made."""

    def __init__(self) -> None:
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._cut: Any = None

    def call(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a layer of the copy and keep what went in and came out."""
        self._layers[layer.name] = layer
        self._inputs[layer.name] = args[0]
        self._outputs[layer.name] = layer(*args, **kwargs)
        return self._outputs[layer.name]

    def input_of(self, name: str) -> Any:
        """KerasTensor that goes into a layer."""
        return self._inputs[name]

    def layers_of(self, base: keras.Model) -> list[Any]:
        """Layers of the copy that a base is made of; where it's cut within a nested model, that model."""
        inside = {id(layer) for layer in base.layers}
        return [layer for layer in self._layers.values() if id(layer) in inside or layer is self._cut]

    def output_of(self, name: str) -> Any:
        """KerasTensor that comes out of a layer, also where the layer is one of a nested model."""
        if name in self._outputs:
            return self._outputs[name]
        outer = next(layer for layer in self._layers.values() if _holds(layer, name))
        self._cut = outer
        below = keras.Model(outer.inputs, _tensor_of(outer, name), name=outer.name)
        return below(self._inputs[outer.name])


def _clone(model: keras.Model, image: Any) -> tuple[keras.Model, _Ends]:
    ends = _Ends()
    # Keras hands out the tensors of each layer for functional models alone; a Sequential is one, seen from outside.
    graph = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    copy = keras.models.clone_model(graph, input_tensors=image, call_function=ends.call, clone_function=_in_float32)
    return copy, ends


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
        config = {**config, "dtype": policy}
    return layer.__class__.from_config(config)


def _in_float32(layer: Any) -> Any:
    return with_dtype(layer, "float32")


def _holds(layer: Any, name: str) -> bool:
    return isinstance(layer, keras.Model) and any(inner.name == name or _holds(inner, name) for inner in layer.layers)


def _tensor_of(model: keras.Model, name: str) -> Any:
    layer = next(inner for inner in model.layers if inner.name == name or _holds(inner, name))
    if layer.name == name and not isinstance(layer, keras.Model):
        return layer.output
    raise DataError(f"spec.model.base.saved.cutAt is {name}, which lies in a model within a model within the model.")


def _load(path: Path) -> keras.Model:
    refused = sorted(_foreign_classes(_config(path)))
    if refused:
        raise DataError(
            f"{path.name} holds {', '.join(refused)}: a base is made of Keras' built-in layers alone, because code "
            "from a file is never run. Save the model with built-in layers in their place."
        )
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name} can't be loaded as a Keras model: {_first_line(error)}") from error
    if not isinstance(model, keras.Model) or not model.built or not getattr(model, "inputs", None):
        raise DataError(
            f"{path.name} isn't a functional or sequential model with a known input: it can't be cut. Save one that "
            "starts with keras.Input((height, width, 3))."
        )
    return model


def _config(path: Path) -> Any:
    """Read the architecture without building anything."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return json.loads(archive.read("config.json"))
        import h5py  # type: ignore[import-untyped]

        with h5py.File(path, "r") as file:
            return json.loads(file.attrs["model_config"])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path.name} is no Keras model: expected a .keras file, or a legacy .h5 that holds a whole model "
            f"(model.save, not model.save_weights): {_first_line(error)}"
        ) from error


def _foreign_classes(config: Any) -> set[str]:
    """Find Lambda layers and classes from outside Keras in a saved architecture."""
    found: set[str] = set()
    if isinstance(config, dict):
        kind = config.get("class_name")
        if kind in {"Lambda", "__lambda__", "function"}:
            found.add(f"a {kind} ({config.get('name') or _inner_name(config)})")
        module = config.get("module")
        if isinstance(module, str) and module.split(".")[0] not in {"keras", "builtins", "tensorflow"}:
            found.add(f"{module}.{kind}")
        for value in config.values():
            found |= _foreign_classes(value)
    elif isinstance(config, list):
        for value in config:
            found |= _foreign_classes(value)
    return found


def _inner_name(config: dict[str, Any]) -> str:
    inner = config.get("config")
    return str(inner.get("name", "")) if isinstance(inner, dict) else str(inner)


def _check_input(model: keras.Model, path: Path) -> None:
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or model.inputs[0].shape[-1] != 3:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in model.inputs)
        raise DataError(f"{path.name} takes {shapes}: a base takes one batch of RGB images, (batch, height, width, 3).")


def _layer_name(model: keras.Model, cut_at: str | int | None, path: Path) -> str | None:
    if cut_at is None:
        return (
            "base" if any(layer.name == "base" and isinstance(layer, keras.Model) for layer in model.layers) else None
        )
    if isinstance(cut_at, int):
        if not -len(model.layers) <= cut_at < len(model.layers):
            raise DataError(
                f"spec.model.base.saved.cutAt is {cut_at}, but {path.name} has {len(model.layers)} layers: an index "
                f"lies between {-len(model.layers)} and {len(model.layers) - 1}."
            )
        return str(model.layers[cut_at].name)
    names = _all_names(model)
    if cut_at not in names:
        near = get_close_matches(cut_at, names, n=2, cutoff=0.4) or names[-2:]
        raise DataError(
            f"spec.model.base.saved.cutAt is {cut_at}, but {path.name} has no layer of that name. "
            f"Did you mean {' or '.join(near)}?"
        )
    return cut_at


def _all_names(model: keras.Model) -> list[str]:
    """List the names of all layers of a model, those of nested models too, from input to output."""
    names: list[str] = []
    for layer in model.layers:
        names.append(layer.name)
        if isinstance(layer, keras.Model):
            names += _all_names(layer)
    return names


def _last_with_weights(model: keras.Model, path: Path) -> str:
    for layer in reversed(model.layers):
        if layer.weights:
            return str(layer.name)
    raise DataError(f"{path.name} has no layer with weights: there's nothing to keep.")


def _size_refusal(model: keras.Model, path: Path, image_size: tuple[int, int], error: Exception) -> str:
    height, width = model.inputs[0].shape[1:3]
    if (height, width) == tuple(image_size) or height is None:
        return f"{path.name} can't be rebuilt as a base for images of {image_size[0]}x{image_size[1]}: {error}"
    return (
        f"{path.name} was made for images of {height}x{width}, and can't take spec.dataset.imageSize "
        f"[{image_size[0]}, {image_size[1]}]. Use [{height}, {width}]."
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
