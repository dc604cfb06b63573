"""Loads and copies weights, and restores state that Keras does not restore."""

import warnings
from pathlib import Path

import keras
import numpy as np

from topwork.errors import DataError, quote_error
from topwork.model.files.inspection import UnsafeFileError, inspect_h5

# Standard deviation of ImageNet pixels in 0..1: IMAGENET_STDDEV_RGB in keras/src/applications/efficientnet.py.
_IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)

_PYTORCH_SUFFIXES = frozenset({".safetensors", ".pth", ".pt", ".bin"})


def load_weights(model: keras.Model, path: Path, name: str) -> None:
    """Load a weights file into a randomly initialized model of keras.applications.

    Args:
        model: The model without its head.
        path: Weights file, from `model.save_weights` or a `*_notop.h5` file of Keras.
        name: Name of the model in keras.applications.

    Raises:
        DataError: If the file does not contain this model's weights.
    """
    if path.suffix in _PYTORCH_SUFFIXES:
        raise DataError(
            f"{path.name} is a file of PyTorch, which computes differently. Convert it first: topwork mirror weights "
            f"STORAGE --from {path.name} --as {name}. Jobs with weights: imagenet and this storage then use it."
        )
    try:
        inspect_h5(path, path.name)
        with warnings.catch_warnings():
            # If a layer is missing in the file, Keras only warns and leaves its random values.
            warnings.simplefilter("error", UserWarning)
            model.load_weights(path)
    except (UnsafeFileError, MemoryError):
        raise
    except Exception as error:  # HDF5 and Keras raise many kinds of errors for corrupt files
        raise DataError(
            f"{path.name} does not contain the weights of {name} without its head (include_top=False): "
            f"{quote_error(error)} Save them with model.save_weights('{name}.weights.h5')."
        ) from error
    if name.startswith("EfficientNetB"):
        _correct_imagenet_variance(model)


def _correct_imagenet_variance(model: keras.Model) -> None:
    """Correct the input normalization in the ImageNet weights of EfficientNet.

    The file contains the standard deviation of the pixels instead of the variance (tensorflow#49930). Keras
    compensates with an extra scaling layer, but only for `weights="imagenet"`: with the same weights from a file,
    pixels would be half as large. This function corrects the variance instead.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            mean, variance, count = layer.get_weights()
            if np.allclose(variance, _IMAGENET_DEVIATION, rtol=1e-3):
                layer.set_weights([mean, variance * _IMAGENET_DEVIATION, count])
                layer.finalize_state()


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Copy the weights of a model to another one of the same architecture.

    Args:
        source: Model to read from.
        target: Model to write to.
    """
    target.set_weights(source.get_weights())
    finalize_normalization(target)


def finalize_normalization(layer: keras.layers.Layer) -> None:
    """Apply newly set weights of the `Normalization` layers in a model.

    `Normalization` computes with constants derived from its weights, and Keras updates these only when it loads a
    file.
    """
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.layers.Normalization):
            inner.finalize_state()
