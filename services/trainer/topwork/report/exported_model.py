"""Loads exported models with the official library of each format, without topwork code in between."""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from topwork.data.images.decode_pool import available_cpus
from topwork.errors import DataError, quote_error
from topwork.spec.dataset import ImageFit

if TYPE_CHECKING:
    from topwork.data.images.decoding import Preprocessing

# float32 or uint8 (batch, height, width, 3) in 0..255 -> float32 (batch, classes)
Predict = Callable[[NDArray[Any]], NDArray[np.float32]]
# Content of image files -> float32 (files, classes)
PredictFiles = Callable[[Sequence[bytes]], NDArray[np.float32]]
BATCH_SIZE = 32


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        predict: Function from images to probabilities.
        image_size: Required height and width in pixels; None if the model resizes images itself.
        predict_files: Function from the content of image files to probabilities; None if the model decodes no files.
    """

    predict: Predict
    image_size: tuple[int, int] | None
    predict_files: PredictFiles | None = None


def load_keras(path: Path) -> LoadedModel:
    """Load a `.keras` file with `keras.models.load_model` in safe mode."""
    import keras

    model = keras.models.load_model(path, compile=False)
    height, width = model.input_shape[1:3]

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(model(images.astype(np.float32), training=False), np.float32)

    return LoadedModel(_in_batches(predict), None if height is None or width is None else (height, width))


def load_saved_model(folder: Path) -> LoadedModel:
    """Load a SavedModel with `tf.saved_model.load`, and call its signatures `serving_default` and `encoded`."""
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        # Look up the signature through the model each time: a signature has only weak references to the variables.
        outputs = model.signatures["serving_default"](image=tf.constant(images.astype(np.float32)))
        return np.asarray(outputs["probabilities"].numpy(), np.float32)

    def predict_files(files: Sequence[bytes]) -> NDArray[np.float32]:
        signature = model.signatures["encoded"]
        batches = [list(files[start : start + BATCH_SIZE]) for start in range(0, len(files), BATCH_SIZE)]
        return np.concatenate([signature(bytes=tf.constant(batch))["probabilities"].numpy() for batch in batches])

    return LoadedModel(_in_batches(predict), None, predict_files)


def load_tflite(path: Path) -> LoadedModel:
    """Load a TFLite file with TensorFlow's interpreter."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation in favor of ai-edge-litert
        interpreter = tf.lite.Interpreter(str(path), num_threads=available_cpus())
    inputs, outputs = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    shape = inputs["shape_signature"]

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        interpreter.resize_tensor_input(inputs["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(inputs["index"], images.astype(np.float32))
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(outputs["index"]), np.float32)

    return LoadedModel(_in_batches(predict), (int(shape[1]), int(shape[2])))


def load_onnx(path: Path) -> LoadedModel:
    """Load an ONNX file with onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()[0]

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {inputs.name: images.astype(np.float32)})[0], np.float32)

    return LoadedModel(_in_batches(predict), (int(inputs.shape[1]), int(inputs.shape[2])))


LOADERS: dict[str, tuple[str, Callable[[Path], LoadedModel]]] = {
    "keras": ("model.keras", load_keras),
    "savedModel": ("", load_saved_model),
    "tflite": ("model.tflite", load_tflite),
    "onnx": ("model.onnx", load_onnx),
}


def load_format(folder: Path, name: str) -> LoadedModel:
    """Load one format from the directory of a version.

    Args:
        folder: The directory.
        name: keras, savedModel, tflite or onnx.

    Returns:
        The loaded model.
    """
    file, loader = LOADERS[name]
    return loader(folder / file)


def read_preprocessing(folder: Path) -> "Preprocessing":
    """Read how the images of a version were decoded and resized in training.

    Args:
        folder: Directory of the version.

    Returns:
        Its settings. Versions of an older topwork, which had fewer settings, have the defaults: the full range of 16
        bits, and images are stretched.

    Raises:
        DataError: If the file is damaged, or was written by a newer topwork with settings that this one does not know.
    """
    from topwork.data.images.decoding import Preprocessing
    from topwork.model.export import PREPROCESSING_FILE  # imports Keras

    file = folder / PREPROCESSING_FILE
    if not file.is_file():
        return Preprocessing()
    try:
        content = json.loads(file.read_text())
        low, high = content["valueRange"]
        value_range, image_fit = (float(low), float(high)), content.get("imageFit", "stretch")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {quote_error(error)}. Download the version again.") from error
    if image_fit not in get_args(ImageFit):
        raise DataError(
            f"{file} has the imageFit {image_fit!r}, but this version of topwork supports "
            f"{', '.join(get_args(ImageFit))}. Use the topwork version that published the model."
        )
    return Preprocessing(value_range, image_fit)


def _in_batches(predict: Predict) -> Predict:
    def predict_all(images: NDArray[Any]) -> NDArray[np.float32]:
        parts = [predict(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)]
        return np.concatenate(parts)

    return predict_all
