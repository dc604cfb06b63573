"""Reads the weights of a Keras 2 model into the layers of Keras 3, by name."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from topwork.model.layer_tree import leaf_layers
from topwork.model.legacy.architecture import MODEL_CLASSES
from topwork.model.legacy.errors import UpgradeError
from topwork.model.legacy.layers import layer_name

# Groups with the layers of a model, by the version of Keras: 2.13 and later, and 2.12.
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies", "_self_tracked_trackables")


def load_h5_weights(model: keras.Model, file: Any) -> None:
    """Load the weights of a legacy `.h5` file.

    Args:
        model: The model, built by `build_model`.
        file: The open HDF5 file.

    Raises:
        UpgradeError: If the file does not contain exactly the weights of the model.
    """
    from keras.src.legacy.saving.legacy_h5_format import load_attributes_from_hdf5_group

    group = file.get("model_weights", file)
    layers = {str(layer.name): layer for layer in model.layers if layer.weights}
    stored = {}
    for name in load_attributes_from_hdf5_group(group, "layer_names"):
        weight_names = load_attributes_from_hdf5_group(group[name], "weight_names")
        if weight_names:
            stored[layer_name(str(name))] = [(str(weight), np.asarray(group[name][weight])) for weight in weight_names]
    for name in {**layers, **stored}:
        if name not in stored or name not in layers:
            raise UpgradeError(f"layer {name} has {'no' if name not in stored else 'unexpected'} weights in the file")
    for name, layer in layers.items():
        _assign_by_name(layer, stored[name])


def _assign_by_name(layer: Any, stored: list[tuple[str, np.ndarray]]) -> None:
    """Assign stored weights to the layers whose names are part of the names of the weights.

    In a nested model, the order of the weights depends on which layers were frozen when it was saved, so that the
    weights of batch normalization, all of the same shape, could be mixed up.
    """
    leaves = {str(leaf.name): leaf for leaf in leaf_layers(layer) if leaf.weights}
    groups: dict[str, list[np.ndarray]] = {name: [] for name in leaves}
    for weight, values in stored:
        owner = next(iter(leaves)) if len(leaves) == 1 else _find_owner(weight, groups)
        if owner is None:
            _assign_in_order(layer, [values for _, values in stored])
            return
        groups[owner].append(values)
    for name, leaf in leaves.items():
        set_values(leaf, groups[name], name)


def _find_owner(weight: str, names: Iterable[str]) -> str | None:
    """Find the layer of a weight such as `outer/conv1/bn/gamma:0`, where `conv1/bn` is the name of a layer."""
    parts = weight.split("/")[:-1]
    spans = ["_".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1)]
    return max((span for span in spans if span in names), key=len, default=None)


def _assign_in_order(layer: Any, values: list[np.ndarray]) -> None:
    """Assign weights whose names do not contain the names of layers, in the order in which Keras 2 stores them."""
    weights = [*layer.trainable_weights, *layer.non_trainable_weights]
    if [tuple(weight.shape) for weight in weights] != [value.shape for value in values]:
        raise UpgradeError(f"layer {layer.name} has weights of other shapes in the file")
    for weight, value in zip(weights, values, strict=True):
        weight.assign(value)


def set_values(layer: Any, values: list[np.ndarray], name: str) -> None:
    """Set the weights of a layer.

    Args:
        layer: The layer.
        values: One array per weight.
        name: Name of the layer, for the error.

    Raises:
        UpgradeError: If the number or the shapes of the arrays are not those of the layer.
    """
    expected, found = [tuple(weight.shape) for weight in layer.weights], [value.shape for value in values]
    if expected != found:
        raise UpgradeError(f"layer {name} expects weights of the shapes {expected[:4]}, but the file has {found[:4]}")
    layer.set_weights(values)


def load_keras_weights(model: keras.Model, config: dict[str, Any], file: Any) -> None:
    """Load the weights of a `.keras` file.

    Args:
        model: The model, built by `build_model`.
        config: Configuration of the model in the file.
        file: The open HDF5 file model.weights.h5.

    Raises:
        UpgradeError: If the file does not contain exactly the weights of the model.
    """
    arrays: dict[str, np.ndarray] = {}

    def collect(name: str, item: Any) -> None:
        if hasattr(item, "shape"):
            # Keras 2.12 on Windows separates groups with a backslash.
            arrays[name.replace("\\", "/")] = np.asarray(item)

    file.visititems(collect)
    _load_container(model, config, "", arrays)


def _load_container(model: keras.Model, config: Any, prefix: str, arrays: dict[str, np.ndarray]) -> None:
    """Load the layers of a model.

    Keras numbers the layers of each class: conv2d, conv2d_1. Numbers can be missing, but the order is that of the
    model.
    """
    from keras.src.utils.naming import to_snake_case

    container = next(
        (f"{prefix}{name}/" for name in _CONTAINERS if _has(arrays, f"{prefix}{name}/")), f"{prefix}layers/"
    )
    groups: dict[str, Iterator[str]] = {}
    for entry in config["layers"]:
        name = layer_name(str(entry.get("name") or entry["config"]["name"]))
        if entry["class_name"] == "InputLayer" or not (layer := _find_layer(model, name)) or not layer.weights:
            continue
        kind = to_snake_case(str(entry["class_name"]))
        groups.setdefault(kind, iter(_numbered_groups(arrays, container, kind)))
        if (group := next(groups[kind], None)) is None:
            raise UpgradeError(f"layer {name} has no weights in the file")
        if entry["class_name"] in MODEL_CLASSES:
            _load_container(layer, entry["config"], group, arrays)
        else:
            _load_leaf(layer, name, group, arrays)


def _load_leaf(layer: Any, name: str, group: str, arrays: dict[str, np.ndarray]) -> None:
    leaf = next(inner for inner in leaf_layers(layer) if inner.weights)
    stored = {path.removeprefix(group) for path in arrays if path.startswith(group)}
    if not any(path.startswith("vars/") for path in stored):
        # Layers in attributes of a layer, such as the projections of MultiHeadAttention.
        for attribute in sorted({path.partition("/")[0] for path in stored}):
            inner = getattr(leaf, attribute, None)
            if not isinstance(inner, keras.layers.Layer) or not inner.weights:
                raise UpgradeError(f"layer {name}, a {type(leaf).__name__}, has inner layers that cannot be read")
            _load_leaf(inner, name, f"{group}{attribute}/", arrays)
        if len(stored) == len(leaf.weights):
            return
    paths = [f"vars/{index}" for index in range(len(leaf.weights))]
    if stored != set(paths):
        raise UpgradeError(f"layer {name}, a {type(leaf).__name__}, has {len(stored)} weights in the file")
    set_values(leaf, [arrays[group + path] for path in paths], name)


def _find_layer(model: keras.Model, name: str) -> Any:
    return next((layer for layer in model.layers if layer.name == name), None)


def _has(arrays: dict[str, np.ndarray], prefix: str) -> bool:
    return any(path.startswith(prefix) for path in arrays)


def _numbered_groups(arrays: dict[str, np.ndarray], container: str, kind: str) -> list[str]:
    pattern = re.compile(rf"{re.escape(container)}{kind}(?:_(\d+))?/")
    found = {int(match[1] or 0): match[0] for path in arrays if (match := pattern.match(path))}
    return [found[number] for number in sorted(found)]
