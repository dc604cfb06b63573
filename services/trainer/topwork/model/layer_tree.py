"""Layers of a model and of the models nested in it: their order, their paths, and how a name finds one."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import keras

from topwork.errors import DataError

LayerPath = tuple[str, ...]
"""Names of the nested models that a layer lies in, from the outside in, and its own name last."""


def walk(model: keras.Model, within: LayerPath = ()) -> Iterator[tuple[LayerPath, Any]]:
    """Give every layer from input to output; a nested model comes first, then its layers in its place.

    Args:
        model: Functional or sequential model.
        within: Path of the model itself.

    Yields:
        The layer's path and the layer. One that several models share comes once for each.
    """
    for layer in model.layers:
        path = (*within, str(layer.name))
        yield path, layer
        if isinstance(layer, keras.Model):
            yield from walk(layer, path)


def leaves(layer: Any) -> Iterator[Any]:
    """Give the layers of a model from input to output, those of nested models in their place, each once."""
    if not isinstance(layer, keras.Model):
        yield layer
        return
    seen: set[int] = set()
    for _, inner in walk(layer):
        if not isinstance(inner, keras.Model) and id(inner) not in seen:
            seen.add(id(inner))
            yield inner


def find(model: keras.Model, name: str, key: str, owner: str) -> tuple[LayerPath, Any]:
    """Find a layer by its name, wherever it is nested.

    Args:
        model: Where to look.
        name: Name of a layer, or the end of its path: `outer/inner`. One that is a whole path comes first.
        key: Path of the key in the spec, for messages.
        owner: What the model is called in messages.

    Returns:
        The layer's path and the layer, which may be a nested model.

    Raises:
        DataError: If there's no such layer, or there are several.
    """
    asked = tuple(name.split("/"))
    layers = list(walk(model))
    found = [(path, layer) for path, layer in layers if path[-len(asked) :] == asked]
    whole = [entry for entry in found if entry[0] == asked]
    if whole or len({id(layer) for _, layer in found}) == 1:
        return (whole or found)[0]
    if found:
        paths = " and ".join("/".join(path) for path, _ in found[:5])
        raise DataError(f"{key} is {name}, and {owner} has {len(found)} layers of that name: {paths}. Name one.")
    names = [path[-1] if len(asked) == 1 else "/".join(path) for path, _ in layers]
    near = list(dict.fromkeys(get_close_matches(name, names, n=2, cutoff=0.4))) or names[-2:]
    raise DataError(f"{key} is {name}, but {owner} has no layer of that name. Did you mean {' or '.join(near)}?")
