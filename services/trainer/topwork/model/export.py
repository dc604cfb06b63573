"""The trained classifier as others use it: probabilities out, in every format, with nothing to preprocess outside."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import tensorflow as tf

from topwork.errors import SpecError
from topwork.model.classifier import in_precision

# The one resize of the pipeline: images (…, height, width, 3) in 0..255 and (height, width) to float32 of that size.
Resize = Callable[[tf.Tensor, tuple[int, int]], tf.Tensor]

# What each format of `spec.publish.formats` leaves in the folder of a version.
EXPORTED = {"keras": "model.keras", "savedModel": "saved_model.pb", "tflite": "model.tflite", "onnx": "model.onnx"}


def with_probabilities(model: keras.Model, classes: int) -> keras.Model:
    """Put what turns logits into probabilities on top of a trained model, whose weights it shares.

    The result holds layers of Keras only, so that plain `keras.models.load_model` loads it, and computes in float32
    even where the training did not: the weights are kept in float32 anyway, and every machine can serve that.

    Args:
        model: Input float32 (batch, height, width, 3) in 0..255, output float32 logits: (batch, 1) for two classes,
            where a positive logit speaks for class 1, else (batch, classes).
        classes: Number of classes.

    Returns:
        A model with the same input whose output is float32 (batch, classes), each row adding up to 1.
    """
    model = in_precision(model, "float32")
    logits = model.output
    if classes == 2:
        second = keras.layers.Activation("sigmoid", name="second_class")(logits)
        first = keras.layers.Rescaling(-1.0, offset=1.0, name="first_class")(second)
        probabilities = keras.layers.Concatenate(name="probabilities")([first, second])
    else:
        probabilities = keras.layers.Softmax(name="probabilities")(logits)
    return keras.Model(model.input, probabilities, name="classifier")


def export(
    model: keras.Model, class_names: Sequence[str], formats: Sequence[str], resize: Resize, folder: Path
) -> tuple[str, ...]:
    """Write a model in each of the formats.

    Args:
        model: As from `with_probabilities`.
        class_names: Name of each class, in the order of the outputs.
        formats: Some of keras, savedModel, tflite and onnx.
        resize: The resize of the pipeline; the SavedModel holds it, the other formats want images of the model's size.
        folder: Where the files go; it exists.

    Returns:
        The main file of each format, relative to `folder`.

    Raises:
        SpecError: If the model holds an operation that a format does not know.
    """
    model(tf.zeros((1, *model.input_shape[1:])), training=False)  # Keras refuses to convert what was never called
    for name in formats:
        path = folder / EXPORTED[name]
        with _quietly():
            if name == "keras":
                model.save(path)
            elif name == "savedModel":
                save_saved_model(model, class_names, resize, folder)
            else:
                _convert(model, name, path)
    return tuple(EXPORTED[name] for name in formats)


def save_saved_model(model: keras.Model, class_names: Sequence[str], resize: Resize, folder: Path) -> None:
    """Write a SavedModel that takes images as they come.

    Its signatures are `serving_default`, with `image` float32 (batch, height, width, 3) in 0..255 of any size, and
    `encoded`, with `bytes` string (batch,), each a whole JPEG, PNG, GIF or BMP file. Both give `class` string
    (batch,), `probability` float32 (batch,), `classes` string (batch, classes) and `probabilities` float32
    (batch, classes).

    Args:
        model: As from `with_probabilities`.
        class_names: Name of each class, in the order of the outputs.
        resize: The resize of the pipeline.
        folder: Where `saved_model.pb` and `variables/` go.
    """
    height, width = model.input_shape[1:3]
    names = tf.constant([name.encode() for name in class_names])

    def answer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        probabilities = model(images, training=False)
        best = tf.argmax(probabilities, axis=-1)
        return {
            "class": tf.gather(names, best),
            "probability": tf.reduce_max(probabilities, axis=-1),
            "classes": tf.tile(names[tf.newaxis], [tf.shape(probabilities)[0], 1]),
            "probabilities": probabilities,
        }

    def decoded(encoded: tf.Tensor) -> tf.Tensor:
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        return tf.ensure_shape(resize(tf.cast(image, tf.float32), (height, width)), (height, width, 3))

    def from_image(image: tf.Tensor) -> dict[str, tf.Tensor]:
        return answer(tf.ensure_shape(resize(image, (height, width)), (None, height, width, 3)))

    def from_encoded(encoded: tf.Tensor) -> dict[str, tf.Tensor]:
        # One by one: images of a request may differ in size until they are resized.
        return answer(tf.map_fn(decoded, encoded, fn_output_signature=tf.TensorSpec((height, width, 3), tf.float32)))

    archive = keras.export.ExportArchive()
    archive.track(model)
    image = tf.TensorSpec((None, None, None, 3), tf.float32, name="image")
    archive.add_endpoint("serving_default", from_image, [image])
    archive.add_endpoint("encoded", from_encoded, [tf.TensorSpec((None,), tf.string, name="bytes")])
    archive.write_out(str(folder), verbose=False)


def _convert(model: keras.Model, name: str, path: Path) -> None:
    try:
        model.export(str(path), format="litert" if name == "tflite" else name, verbose=False)
        if name == "onnx":
            _check_onnx(path)
    except Exception as error:
        raise SpecError(
            f"spec.publish.formats holds {name}, but this model can't be converted to it "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
            f"Leave {name} out."
        ) from error


def _check_onnx(path: Path) -> None:
    """Refuse what tf2onnx writes where it knows no counterpart of an operation: a file that nothing can run."""
    import onnx

    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    graph = onnx.load(path, load_external_data=False).graph
    unknown = sorted({node.op_type for node in graph.node if node.domain in ("", "ai.onnx")} - known)
    if unknown:
        raise ValueError(f"ONNX has no operation like {', '.join(unknown)}")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the converters say away from the user: pages of tensor specs, and warnings about their own future."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
