"""Exports a trained classifier as Keras, SavedModel, TFLite or ONNX.

Input scaling is part of every format. Decoding and resizing are part of the SavedModel.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import keras
import tensorflow as tf

from topwork.errors import SpecError
from topwork.model.classifier import with_precision


class Preprocessing(Protocol):
    """How image files become the input of a model; `topwork.data.images.decoding.Preprocessing` implements it."""

    @property
    def value_range(self) -> tuple[float, float]:
        """Values that become 0 and 255 in images with more than 8 bits per channel."""
        ...

    @property
    def image_fit(self) -> str:
        """How images with another aspect ratio than the input are resized."""
        ...

    def load(self, encoded: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
        """Decode and resize a file, scalar string, to float32 (height, width, 3) in 0..255 inside a graph."""
        ...

    def resize(self, image: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
        """Resize images (..., height, width, 3) in 0..255 to float32 of the given height and width."""
        ...


PREPROCESSING_FILE = "preprocessing.json"
"""File of a version with what `topwork predict` needs in addition to the model."""

# Main file of each format of `spec.publish.formats`.
EXPORTED_FILES = {
    "keras": "model.keras",
    "savedModel": "saved_model.pb",
    "tflite": "model.tflite",
    "onnx": "model.onnx",
}
# Characters of an error of a converter, some of which print whole graphs.
MAX_REASON = 200


def add_probabilities(model: keras.Model, classes: int, temperature: float | None = None) -> keras.Model:
    """Add the conversion from logits to probabilities to a trained model.

    The result consists of built-in Keras layers, so that plain `keras.models.load_model` can load it. It computes in
    float32, which every machine supports, even if training used another precision.

    Args:
        model: Input float32 (batch, height, width, 3) in 0..255, output float32 logits: (batch, 1) for two classes,
            where a positive logit means class 1, otherwise (batch, classes).
        classes: Number of classes.
        temperature: Number that the logits are divided by; None leaves them unchanged. See `topwork.model.calibration`.

    Returns:
        A model with the same input and weights and output float32 (batch, classes); each row sums to 1.
    """
    model = with_precision(model, "float32")
    logits = model.output
    if temperature is not None:
        logits = keras.layers.Rescaling(1 / temperature, name="temperature")(logits)
    if classes == 2:
        second = keras.layers.Activation("sigmoid", name="second_class")(logits)
        first = keras.layers.Rescaling(-1.0, offset=1.0, name="first_class")(second)
        probabilities = keras.layers.Concatenate(name="probabilities")([first, second])
    else:
        probabilities = keras.layers.Softmax(name="probabilities")(logits)
    return keras.Model(model.input, probabilities, name="classifier")


def export_model(
    model: keras.Model,
    class_names: Sequence[str],
    formats: Sequence[str],
    preprocessing: Preprocessing,
    folder: Path,
    *,
    decodes_files: bool = True,
) -> tuple[str, ...]:
    """Export a model in the given formats.

    Args:
        model: The result of `add_probabilities`.
        class_names: Name of each class, in the order of the outputs.
        formats: Any of keras, savedModel, tflite and onnx.
        preprocessing: Decoding and resizing as in training. Only the SavedModel contains it; other formats expect
            images of the model's input size. Its settings are also written to `PREPROCESSING_FILE`.
        folder: Existing directory for the files.
        decodes_files: Whether the SavedModel has the signature `encoded`.

    Returns:
        The main file of each format, relative to `folder`.

    Raises:
        SpecError: If the model contains an operation that a format does not support.
    """
    model(tf.zeros((1, *model.input_shape[1:])), training=False)  # Keras cannot convert a model that was never called
    for name in formats:
        path = folder / EXPORTED_FILES[name]
        with report_unsupported_format(name), _silence_converters():
            if name == "keras":
                model.save(path)
            elif name == "savedModel":
                save_saved_model(model, class_names, preprocessing, folder, decodes_files=decodes_files)
            else:
                _convert(model, name, path)
    content = {"format": 1, "valueRange": preprocessing.value_range, "imageFit": preprocessing.image_fit}
    (folder / PREPROCESSING_FILE).write_text(json.dumps(content) + "\n")
    return tuple(EXPORTED_FILES[name] for name in formats)


def save_saved_model(
    model: keras.Model, class_names: Sequence[str], preprocessing: Preprocessing, folder: Path, *, decodes_files: bool
) -> None:
    """Write a SavedModel that accepts images of any size.

    Signatures:
        serving_default: `image` float32 (batch, height, width, 3) in 0..255.
        encoded: `bytes` string (batch,), each the content of a JPEG, PNG, WebP, GIF or BMP file. Only if
            `decodes_files` is true.

    Both return `class` string (batch,), `probability` float32 (batch,), `classes` string (batch, classes) and
    `probabilities` float32 (batch, classes).

    Args:
        model: The result of `add_probabilities`.
        class_names: Name of each class, in the order of the outputs.
        preprocessing: Decoding and resizing as in training.
        folder: Directory for `saved_model.pb` and `variables/`.
        decodes_files: Whether to write the signature `encoded`.
    """
    height, width = model.input_shape[1:3]
    names = tf.constant([name.encode() for name in class_names])

    def classify(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model(images, training=False)
        best = tf.argmax(probabilities, axis=-1)
        return {
            "class": tf.gather(names, best),
            "probability": tf.reduce_max(probabilities, axis=-1),
            "classes": tf.tile(names[tf.newaxis], [tf.shape(probabilities)[0], 1]),
            "probabilities": probabilities,
        }

    # Traced once, for both signatures.
    classify_images: Callable[[tf.Tensor], dict[str, tf.Tensor]] = tf.function(
        classify, autograph=False, input_signature=[tf.TensorSpec((None, height, width, 3), tf.float32)]
    )

    def from_image(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return classify_images(tf.ensure_shape(preprocessing.resize(image, (height, width)), (None, height, width, 3)))

    def from_encoded(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        # One by one: the images of a request may differ in size before they are resized.
        output = tf.TensorSpec((height, width, 3), tf.float32)
        load = partial(preprocessing.load, size=(height, width))
        return classify_images(tf.map_fn(load, encoded, fn_output_signature=output))

    def trace(function: Callable[[tf.Tensor], dict[str, tf.Tensor]], argument: tf.TensorSpec) -> Any:
        return tf.function(function, autograph=False, input_signature=[argument]).get_concrete_function()

    # Not `keras.export.ExportArchive`: it also exports methods, and traces the model four times.
    signatures = {"serving_default": trace(from_image, tf.TensorSpec((None, None, None, 3), tf.float32, name="image"))}
    if decodes_files:
        signatures["encoded"] = trace(from_encoded, tf.TensorSpec((None,), tf.string, name="bytes"))
    module = tf.Module()
    module.weights = list(signatures["serving_default"].variables)
    tf.saved_model.save(module, str(folder), signatures=signatures)


@contextlib.contextmanager
def report_unsupported_format(name: str) -> Iterator[None]:
    """Report that a model cannot be exported in a format; a full disk or memory keeps its own error.

    Args:
        name: The format.

    Raises:
        SpecError: If the body raised another error, with the first line of it as the reason.
    """
    try:
        yield
    except (OSError, MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        reason = lines[0] if len(lines[0]) <= MAX_REASON else f"{lines[0][:MAX_REASON]}…"
        raise SpecError(
            f"spec.publish.formats contains {name}, but this model cannot be exported as {name} "
            f"({type(error).__name__}: {reason}). Leave {name} out of spec.publish.formats."
        ) from error


def _convert(model: keras.Model, name: str, path: Path) -> None:
    model.export(str(path), format="litert" if name == "tflite" else name, verbose=False)
    if name == "onnx":
        _check_onnx(path)


def _check_onnx(path: Path) -> None:
    """Reject files with unknown operations, which tf2onnx writes if ONNX has no counterpart of an operation."""
    import onnx

    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    graph = onnx.load(path, load_external_data=False).graph
    unknown = sorted({node.op_type for node in graph.node if node.domain in ("", "ai.onnx")} - known)
    if unknown:
        raise ValueError(f"ONNX does not support {', '.join(unknown)}")


@contextlib.contextmanager
def _silence_converters() -> Iterator[None]:
    """Suppress the output of the converters: pages of tensor specs, and deprecation warnings."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
