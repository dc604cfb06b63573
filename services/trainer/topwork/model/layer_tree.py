"""Traverses the layers of nested models and finds them by name or path."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import keras

from topwork.errors import DataError

LayerPath = tuple[str, ...]
"""Names of the nested models that contain a layer, outermost first, then the name of the layer."""


def walk_layers(model: keras.Model, within: LayerPath = ()) -> Iterator[tuple[LayerPath, Any]]:
    """Iterate over all layers from input to output; a nested model comes right before its layers.

    Args:
        model: Functional or sequential model.
        within: Path of the model.

    Yields:
        The path of the layer and the layer. A layer shared by several models is yielded once for each.
    """
    for layer in model.layers:
        path = (*within, str(layer.name))
        yield path, layer
        if isinstance(layer, keras.Model):
            yield from walk_layers(layer, path)


def leaf_layers(layer: Any) -> Iterator[Any]:
    """Iterate over the layers of a model and its nested models from input to output, each layer once."""
    if not isinstance(layer, keras.Model):
        yield layer
        return
    seen: set[int] = set()
    for _, inner in walk_layers(layer):
        if not isinstance(inner, keras.Model) and id(inner) not in seen:
            seen.add(id(inner))
            yield inner


def find_layer(model: keras.Model, name: str, key: str, owner: str) -> tuple[LayerPath, Any]:
    """Find a layer by name, at any nesting depth.

    Args:
        model: Model to search.
        name: Name of a layer, or the end of its path: `outer/inner`. A complete path takes precedence.
        key: Path of the spec key, for error messages.
        owner: Name of the model in error messages.

    Returns:
        The path of the layer and the layer, which may be a nested model.

    Raises:
        DataError: If there is no such layer, or more than one.
    """
    parts = tuple(name.split("/"))
    layers = list(walk_layers(model))
    matches = [(path, layer) for path, layer in layers if path[-len(parts) :] == parts]
    exact = [entry for entry in matches if entry[0] == parts]
    if exact or len({id(layer) for _, layer in matches}) == 1:
        return (exact or matches)[0]
    if matches:
        paths = " and ".join("/".join(path) for path, _ in matches[:5])
        raise DataError(
            f"{key} is {name}, and {owner} has {len(matches)} layers of that name: {paths}. Use one of these paths."
        )
    names = [path[-1] if len(parts) == 1 else "/".join(path) for path, _ in layers]
    suggestions = list(dict.fromkeys(get_close_matches(name, names, n=2, cutoff=0.4))) or names[-2:]
    raise DataError(f"{key} is {name}, but {owner} has no layer of that name. Did you mean {' or '.join(suggestions)}?")
