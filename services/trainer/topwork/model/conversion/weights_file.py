"""Reads weights files of Keras and of PyTorch for the models of `APPLICATIONS`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np

from topwork.errors import DataError, SettingError
from topwork.model.backbones import find_backbone
from topwork.model.conversion.converted_file import read_variant, save_converted
from topwork.model.conversion.graph import apply_variant
from topwork.model.conversion.layer_names import Style, find_styles, rename_old_names
from topwork.model.conversion.layers import MismatchError, assign_layers
from topwork.model.conversion.source_models import choose_variant
from topwork.model.conversion.state_dict import read_state_dict
from topwork.model.conversion.variant import Variant
from topwork.model.files.inspection import is_hdf5
from topwork.model.layer_tree import leaf_layers
from topwork.spec.applications import APPLICATIONS

# Relative difference in the number of values up to which a file is taken for that of a model. Biases of ResNet, which
# only Keras has, make up 0.3 %.
_SIZE_TOLERANCE = 0.01


@dataclass(frozen=True)
class LoadedWeights:
    """Weights in a model.

    Attributes:
        model: The model without its head.
        variant: How it differs from that of keras.applications; None if it does not.
    """

    model: keras.Model
    variant: Variant | None

    def save(self, path: Path) -> None:
        """Save the weights to a file that `Backbone.build` reads."""
        if self.variant is None:
            self.model.save_weights(path)
        else:
            save_converted(self.model, self.variant, path)

    def equals(self, other: "LoadedWeights") -> bool:
        """Return whether both compute the same."""
        ours, theirs = self.model.get_weights(), other.model.get_weights()
        return (
            _computation(self.variant) == _computation(other.variant)
            and len(ours) == len(theirs)
            and all(np.array_equal(one, two) for one, two in zip(ours, theirs, strict=True))
        )


def load_weights_file(
    name: str,
    image_size: tuple[int, int],
    path: Path,
    source_model: str | None = None,
    normalization: str | None = None,
) -> LoadedWeights:
    """Build a base with the weights of a file.

    Args:
        name: Name of the model in `APPLICATIONS`.
        image_size: Height and width in pixels.
        path: HDF5 file of Keras with the weights of the base, or state dict of PyTorch (`.safetensors`, `.pth`).
        source_model: Model of a PyTorch library that the weights come from.
        normalization: Input normalization of that model; needed if several are usual.

    Returns:
        The base. If it has a variant with a normalization, it expects normalized input.

    Raises:
        DataError: If the file does not contain the weights of this model.
        SettingError: If the model that the weights come from is unclear or unknown.

    Example:
        `load_weights_file("EfficientNetB0", (224, 224), Path("model.safetensors"), "timm/tf_efficientnet_b0.in1k")`
    """
    if path.suffix in {".h5", ".hdf5"} or is_hdf5(path):
        if source_model or normalization:
            raise SettingError(
                f"{path.name} is a file of Keras. --source-model and --normalization apply only to files of PyTorch."
            )
        return LoadedWeights(find_backbone(name).build(image_size, path), read_variant(path))
    state = read_state_dict(path)
    renamed = rename_old_names(state)
    state = {renamed[key]: values for key, values in state.items()}
    style = _find_style(name, state, path)
    if suggestion := _suggest(state, name):
        raise DataError(f"{path.name} does not contain the weights of {name}. {suggestion}")
    variant = choose_variant(name, style.libraries, source_model, normalization)
    base = find_backbone(name).build(image_size, None)
    if variant:
        base = apply_variant(base, variant)
    names = style.names([layer.name for layer in leaf_layers(base) if layer.weights])
    try:
        assign_layers(base, state, names, ignored=(style.head,), absent_biases_are_zero=style.absent_biases_are_zero)
    except MismatchError as error:
        raise DataError(f"{path.name} does not contain the weights of {name}. {error}") from error
    return LoadedWeights(base, variant)


def _find_style(name: str, state: Mapping[str, np.ndarray], path: Path) -> Style:
    styles = find_styles(name)
    if not styles:
        raise DataError(
            f"{path.name} is a state dict of PyTorch, which cannot be converted to {name}. Models that can be "
            f"converted: {', '.join(model for model in APPLICATIONS if find_styles(model))}."
        )
    for style in styles:
        if style.marker in state:
            return style
    libraries = ", ".join(library for style in styles for library in style.libraries)
    raise DataError(
        f"{path.name} does not contain the weights of {name} with the tensor names of {libraries}: it has no "
        f"{' or '.join(style.marker for style in styles)}. {_suggest(state, name)} It contains "
        f"{', '.join(sorted(state)[:3])}."
    )


def _suggest(state: Mapping[str, np.ndarray], name: str) -> str:
    """Name the model whose layers are named as the tensors, and whose base has as many values, if it is another one."""
    differences: dict[str, float] = {}
    for model, application in APPLICATIONS.items():
        for style in find_styles(model):
            if style.marker in state:
                found, expected = style.count_values(state), application.parameters_without_top
                differences[model] = abs(found - expected) / expected
    nearest = min(differences, key=lambda model: differences[model], default=name)
    if nearest == name or differences[nearest] > _SIZE_TOLERANCE or differences.get(name, 1) < _SIZE_TOLERANCE:
        return ""
    return f"It seems to be {nearest}: use --as {nearest}."


def _computation(variant: Variant | None) -> Variant | None:
    return variant and replace(variant, source="")
