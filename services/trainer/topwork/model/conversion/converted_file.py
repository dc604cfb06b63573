"""Files of converted weights: HDF5 with the weights of each layer by its name, and a description of the variant.

Keras cannot load such a file, and neither can versions of topwork that do not know variants: in the unchanged model of
keras.applications, the weights would compute wrong features without an error.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from topwork.errors import DataError
from topwork.model.conversion.variant import Variant, parse_variant
from topwork.model.files.inspection import inspect_h5, is_hdf5
from topwork.model.layer_tree import leaf_layers

_ATTRIBUTE, _GROUP = "topwork_conversion", "converted_layers"
_MAX_DESCRIPTION = 10_000


def save_converted(model: keras.Model, variant: Variant, path: Path) -> None:
    """Save a variant of a model.

    Args:
        model: Result of `apply_variant`, with its weights.
        variant: Its variant.
        path: File to write.
    """
    import h5py  # type: ignore[import-untyped]

    with h5py.File(path, "w") as file:
        file.attrs[_ATTRIBUTE] = variant.to_json()
        for layer in _layers_with_weights(model):
            for index, values in enumerate(layer.get_weights()):
                file[f"{_GROUP}/{layer.name}/{index}"] = values


def read_variant(path: Path) -> Variant | None:
    """Read the variant that a weights file is for.

    Args:
        path: Weights file.

    Returns:
        The variant; None if the file is no converted one.

    Raises:
        UnsafeFileError: If the file contains content that does not belong in a weights file.
        DataError: If the description is invalid.
    """
    import h5py

    if not path.is_file() or not is_hdf5(path):
        return None
    try:
        with h5py.File(path, "r") as file:
            text = file.attrs.get(_ATTRIBUTE)
            if text is None and _GROUP not in file:
                return None
    except OSError:
        return None  # damaged; reported where the weights are loaded
    if not isinstance(text, str) or len(text) > _MAX_DESCRIPTION:
        raise DataError(f"{path.name} has converted weights, but no valid description of them. Copy the file again.")
    return parse_variant(text, path.name)


def load_converted(model: keras.Model, path: Path) -> None:
    """Load the weights of a converted file.

    Args:
        model: Result of `apply_variant`.
        path: The file.

    Raises:
        UnsafeFileError: If the file contains content that does not belong in a weights file.
        DataError: If it does not contain exactly the weights of this model.
    """
    import h5py

    inspect_h5(path, path.name)
    with h5py.File(path, "r") as file:
        stored = file[_GROUP]
        layers = list(_layers_with_weights(model))
        extra = set(stored) - {layer.name for layer in layers}
        problems = [f"the file has a layer {min(extra)}, which the model lacks"] if extra else []
        values = [_read_layer(stored, layer, problems) for layer in layers]
        if problems:
            raise DataError(
                f"{path.name} does not fit the model that it describes: {problems[0]}. Convert the original file "
                "again: topwork mirror weights STORAGE --from FILE."
            )
        for layer, arrays in zip(layers, values, strict=True):
            layer.set_weights(arrays)


def _read_layer(stored: Any, layer: Any, problems: list[str]) -> list[Any]:
    import h5py

    group = stored.get(layer.name)
    shapes = [tuple(variable.shape) for variable in layer.weights]
    arrays = [group[key] for key in sorted(group, key=str)] if isinstance(group, h5py.Group) else []
    found = [tuple(getattr(array, "shape", ())) for array in arrays]
    if found != shapes:
        problems.append(f"layer {layer.name} has weights of shapes {found}, expected {shapes}")
        return []
    return [array[()] for array in arrays]


def _layers_with_weights(model: keras.Model) -> Iterator[Any]:
    return (layer for layer in leaf_layers(model) if layer.weights)
