"""Loads weights files of Keras and of PyTorch into bases."""

from collections.abc import Callable
from pathlib import Path

import keras

from topwork.errors import DataError
from topwork.model.backbones import find_backbone
from topwork.model.conversion import efficientnet_lite
from topwork.model.conversion.layers import assign_layers
from topwork.model.conversion.state_dict import read_state_dict
from topwork.model.files.inspection import is_hdf5

# An architecture of the same name can compute differently in PyTorch: ResNet50 strides another convolution, and
# MobileNetV2 pads differently. Only architectures whose features are equal are listed.
LAYER_NAMES: dict[str, Callable[[], dict[str, str]]] = {"EfficientNetLite0": efficientnet_lite.layer_names}


def build_from_file(name: str, image_size: tuple[int, int], path: Path) -> keras.Model:
    """Build a base with the weights of a file.

    Args:
        name: Name of the model in `APPLICATIONS`.
        image_size: Height and width in pixels.
        path: HDF5 file of Keras with the weights of the base, or state dict of PyTorch (`.safetensors`, `.pth`).

    Returns:
        The base, as `Backbone.build` returns it.

    Raises:
        DataError: If the file does not contain the weights of this model, or the model cannot be converted.

    Example:
        `build_from_file("EfficientNetLite0", (224, 224), Path("efficientnet_lite0.pth"))`
    """
    if path.suffix in {".h5", ".hdf5"} or is_hdf5(path):
        return find_backbone(name).build(image_size, path)
    state = read_state_dict(path)
    if name not in LAYER_NAMES:
        raise DataError(
            f"{path.name} is a state dict of PyTorch, which topwork converts only for {', '.join(LAYER_NAMES)}: "
            f"models of other frameworks that are named {name} can compute other features than the one of Keras. "
            "Use a file that model.save_weights of Keras wrote, or convert the model to a .keras file and set "
            "spec.model.base.saved."
        )
    base = find_backbone(name).build(image_size, None)
    try:
        assign_layers(base, state, LAYER_NAMES[name]())
    except DataError as error:
        raise DataError(f"{path.name} does not contain the weights of {name}: {error}") from error
    return base
