"""An exported model, loaded with the plain library of its format and nothing of topwork in between."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topwork.data.decode_pool import available_cpus

# float32 or uint8 (batch, height, width, 3) in 0..255 -> float32 (batch, classes)
Predict = Callable[[NDArray[Any]], NDArray[np.float32]]
BATCH = 32


@dataclass(frozen=True)
class Loaded:
    """A model that answers.

    Attributes:
        predict: Images of the model's size to probabilities.
        image_size: Height and width in pixels that images must have; None where the model resizes by itself.
    """

    predict: Predict
    image_size: tuple[int, int] | None


def load_keras(path: Path) -> Loaded:
    """Load a `.keras` file with `keras.models.load_model`, in its safe mode."""
    import keras

    model = keras.models.load_model(path, compile=False)
    height, width = model.input_shape[1:3]

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(model(images.astype(np.float32), training=False), np.float32)

    return Loaded(_in_batches(predict), None if height is None or width is None else (height, width))


def load_saved_model(folder: Path) -> Loaded:
    """Load a SavedModel with `tf.saved_model.load` and answer by its signature `serving_default`."""
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        # Asked for by its model each time: a signature holds the variables weakly, and alone would lose them.
        answer = model.signatures["serving_default"](image=tf.constant(images.astype(np.float32)))
        return np.asarray(answer["probabilities"].numpy(), np.float32)

    return Loaded(_in_batches(predict), None)


def load_tflite(path: Path) -> Loaded:
    """Load a TFLite file with TensorFlow's interpreter."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of its successor, ai-edge-litert
        interpreter = tf.lite.Interpreter(str(path), num_threads=available_cpus())
    entry, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    shape = entry["shape_signature"]

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        interpreter.resize_tensor_input(entry["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry["index"], images.astype(np.float32))
        interpreter.invoke()
        return np.asarray(interpreter.get_tensor(result["index"]), np.float32)

    return Loaded(_in_batches(predict), (int(shape[1]), int(shape[2])))


def load_onnx(path: Path) -> Loaded:
    """Load an ONNX file with onnxruntime on the processor."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]

    def predict(images: NDArray[Any]) -> NDArray[np.float32]:
        return np.asarray(session.run(None, {entry.name: images.astype(np.float32)})[0], np.float32)

    return Loaded(_in_batches(predict), (int(entry.shape[1]), int(entry.shape[2])))


LOADERS: dict[str, tuple[str, Callable[[Path], Loaded]]] = {
    "keras": ("model.keras", load_keras),
    "savedModel": ("", load_saved_model),
    "tflite": ("model.tflite", load_tflite),
    "onnx": ("model.onnx", load_onnx),
}


def load(folder: Path, name: str) -> Loaded:
    """Load one format from the folder of a version.

    Args:
        folder: The folder.
        name: keras, savedModel, tflite or onnx.

    Returns:
        The model.
    """
    file, loader = LOADERS[name]
    return loader(folder / file)


def encoded_probabilities(folder: Path, files: Sequence[bytes]) -> NDArray[np.float32]:
    """Ask the signature `encoded` of a SavedModel.

    Args:
        folder: Folder of the SavedModel.
        files: Whole image files.

    Returns:
        float32 (files, classes).
    """
    import tensorflow as tf

    model = tf.saved_model.load(str(folder))
    answer = model.signatures["encoded"]
    batches = [
        answer(bytes=tf.constant(list(files[start : start + BATCH])))["probabilities"].numpy()
        for start in range(0, len(files), BATCH)
    ]
    return np.concatenate(batches).astype(np.float32)


def _in_batches(predict: Predict) -> Predict:
    def predict_all(images: NDArray[Any]) -> NDArray[np.float32]:
        parts = [predict(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(parts)

    return predict_all
