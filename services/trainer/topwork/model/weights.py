"""Weights from files and from other models, with what Keras leaves to be done by hand."""

import warnings
from pathlib import Path

import keras
import numpy as np

from topwork.errors import DataError
from topwork.model.file_inspection import Refused, check_h5

# Deviation of ImageNet's pixels in 0..1: IMAGENET_STDDEV_RGB of keras/src/applications/efficientnet.py.
_IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def load_weights(model: keras.Model, path: Path, name: str) -> None:
    """Load a file of weights into a model of keras.applications that was built with random ones.

    Args:
        model: The model without its head.
        path: File of weights: `model.save_weights`, or Keras' own `*_notop.h5`.
        name: Name of the model in keras.applications.

    Raises:
        DataError: If the file doesn't hold this model's weights.
    """
    try:
        check_h5(path, path.name)
        with warnings.catch_warnings():
            # Keras only warns where a file lacks a layer, and leaves that layer at random values.
            warnings.simplefilter("error", UserWarning)
            model.load_weights(path)
    except (Refused, MemoryError):
        raise
    except Exception as error:  # HDF5 and Keras raise half a dozen kinds of errors of broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path.name} doesn't hold the weights of {name} without its head (include_top=False): {reason} "
            f"Save them with model.save_weights('{name}.weights.h5')."
        ) from error
    if name.startswith("EfficientNetB"):
        _scale_as_imagenet(model)


def _scale_as_imagenet(model: keras.Model) -> None:
    """Give ImageNet's weights of EfficientNet their scaling.

    Their file holds the deviation of the pixels where the variance should be (tensorflow#49930). Keras makes up for
    it with one more scaling layer, which it adds for `weights="imagenet"` alone: with the same weights from a file,
    pixels would come out half as large. Here the variance is put right instead.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            mean, variance, count = layer.get_weights()
            if np.allclose(variance, _IMAGENET_DEVIATION, rtol=1e-3):
                layer.set_weights([mean, variance * _IMAGENET_DEVIATION, count])
                layer.finalize_state()


def copy_weights(source: keras.Model, target: keras.Model) -> None:
    """Give a model the weights of another of the same architecture.

    Args:
        source: Whose weights are read.
        target: Whose weights are set.
    """
    target.set_weights(source.get_weights())
    finalize(target)


def finalize(layer: keras.layers.Layer) -> None:
    """Let the normalizations of pixels in a model take up weights that were set.

    `Normalization` computes with constants that it makes of its weights, and Keras renews them only where it loads a
    file.
    """
    for inner in layer._flatten_layers():
        if isinstance(inner, keras.layers.Normalization):
            inner.finalize_state()
