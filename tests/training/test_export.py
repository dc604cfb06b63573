"""Every export format, loaded by its own library in another process, predicts like the exported model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from topwork.data.decoding import resize
from topwork.errors import SpecError
from topwork.model.export import add_probabilities, export_model
from topwork.report import export_check
from topwork.report.export_check import check_export, spread_indices, write_check_inputs
from topwork.report.exported_model import load_format

FORMATS = ("keras", "savedModel", "tflite", "onnx")


def logits_model(classes, policy="float32"):
    """Input scaling, a nested base with BatchNorm and depthwise convolution, and a head."""
    keras.utils.set_random_seed(classes)
    image = keras.Input((32, 32, 3), name="image")
    scaled = keras.layers.Rescaling(1 / 127.5, offset=-1.0, name="input_scaling")(image)
    base_input = keras.Input((32, 32, 3))
    features = keras.layers.Conv2D(8, 3, strides=2, dtype=policy)(base_input)
    features = keras.layers.BatchNormalization(dtype=policy)(features)
    features = keras.layers.DepthwiseConv2D(3, activation="relu", dtype=policy)(features)
    base = keras.Model(base_input, features, name="base")
    vector = keras.layers.GlobalAveragePooling2D(dtype=policy)(base(scaled))
    units = 1 if classes == 2 else classes
    return keras.Model(image, keras.layers.Dense(units, name="logits", dtype="float32")(vector))


def check_inputs(model, directory):
    """Write inputs for the export check: 12 random images, half of them also as PNG files."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    probabilities = model(images.astype(np.float32), training=False).numpy()
    encoded = [(index, tf.io.encode_png(images[index]).numpy()) for index in range(0, 12, 2)]
    write_check_inputs(directory, images, probabilities, probabilities.argmax(axis=1), encoded)
    return probabilities


@pytest.mark.parametrize("classes", [2, 3])
def test_every_format_predicts_like_the_model_and_tampering_is_detected(classes, tmp_path, capfd):
    model = add_probabilities(logits_model(classes), classes)
    probabilities = check_inputs(model, tmp_path / "inputs")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
    version = tmp_path / "version"
    version.mkdir()
    files = export_model(model, ("a", "b", "ünïcode")[:classes], FORMATS, resize, version)
    assert capfd.readouterr().out == ""
    assert files == ("model.keras", "saved_model.pb", "model.tflite", "model.onnx")
    if classes == 2:  # one check in a new process is enough
        result = check_export(version, tmp_path / "inputs", FORMATS)
        assert (result.images, result.encoded_images) == (12, 6)
        assert set(result.largest_difference) == {*FORMATS, "encoded"}
        assert set(result.accuracy.values()) == {1.0}
    else:
        differences = export_check.compare_predictions(version, tmp_path / "inputs", FORMATS).largest_difference
        assert max(differences.values()) < 1e-5
        _tamper(model)
        model.save(version / "model.keras")
        result = export_check.compare_predictions(version, tmp_path / "inputs", FORMATS)
        assert result.largest_difference["keras"] > export_check.TOLERANCE
        assert result.largest_difference["savedModel"] < 1e-5


def _tamper(model):
    model.set_weights([weights * 1.05 for weights in model.get_weights()])


def test_saved_model_accepts_images_and_files_of_any_size(tmp_path):
    model = add_probabilities(logits_model(3), 3)
    export_model(model, ("a", "b", "ünïcode"), ("savedModel",), resize, tmp_path)
    signatures = tf.saved_model.load(str(tmp_path)).signatures
    sizes = [(50, 41), (32, 32), (20, 90)]
    images = [tf.random.stateless_uniform((*size, 3), (0, 1), 0, 256, tf.int32) for size in sizes]
    expected = np.concatenate([model(resize(image, (32, 32))[tf.newaxis]).numpy() for image in images])
    files = [tf.io.encode_png(tf.cast(image, tf.uint8)) for image in images]
    outputs = {name: value.numpy() for name, value in signatures["encoded"](bytes=tf.stack(files)).items()}
    np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-6)
    np.testing.assert_allclose(outputs["probability"], expected.max(axis=1), atol=1e-6)
    names = np.array(["a", "b", "ünïcode"])
    assert [name.decode() for name in outputs["class"]] == names[expected.argmax(axis=1)].tolist()
    assert [[name.decode() for name in row] for row in outputs["classes"]] == [names.tolist()] * 3
    image = tf.cast(images[0], tf.float32)[tf.newaxis]
    by_image = signatures["serving_default"](image=image)["probabilities"].numpy()
    np.testing.assert_allclose(by_image, expected[:1], atol=1e-6)


def test_grayscale_file_is_predicted_like_an_rgb_one(tmp_path):
    model = add_probabilities(logits_model(2), 2)
    export_model(model, ("a", "b"), ("savedModel",), resize, tmp_path)
    encoded = tf.saved_model.load(str(tmp_path)).signatures["encoded"]
    gray = tf.cast(tf.random.stateless_uniform((40, 40, 1), (0, 1), 0, 256, tf.int32), tf.uint8)
    files = [tf.io.encode_png(gray), tf.io.encode_png(tf.repeat(gray, 3, axis=-1)), tf.io.encode_jpeg(gray)]
    probabilities = encoded(bytes=tf.stack(files))["probabilities"].numpy()
    np.testing.assert_array_equal(probabilities[0], probabilities[1])


def test_mixed_precision_model_is_exported_in_float32(tmp_path):
    mixed = logits_model(3, "mixed_bfloat16")
    exact = logits_model(3)
    exact.set_weights(mixed.get_weights())
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    published = add_probabilities(mixed, 3)
    np.testing.assert_array_equal(published(images).numpy(), add_probabilities(exact, 3)(images).numpy())
    export_model(published, ("a", "b", "c"), ("keras", "tflite"), resize, tmp_path)
    np.testing.assert_allclose(load_format(tmp_path, "tflite").predict(images), published(images).numpy(), atol=1e-5)


def test_unsupported_format_is_reported(tmp_path, monkeypatch):
    model = add_probabilities(logits_model(2), 2)

    def raise_export_error(*arguments, **named):
        raise ValueError("no converter for Frobnicate\nand pages more")

    monkeypatch.setattr(model, "export", raise_export_error)
    with pytest.raises(SpecError) as raised:
        export_model(model, ("a", "b"), ("onnx",), resize, tmp_path)
    assert str(raised.value) == (
        "spec.publish.formats contains onnx, but this model cannot be converted to onnx (ValueError: no converter for "
        "Frobnicate). Remove onnx from the list."
    )


def test_operation_unsupported_by_onnx_is_reported(tmp_path):
    image = keras.Input((32, 32, 3), name="image")
    features = keras.layers.Activation("gelu")(keras.layers.GlobalAveragePooling2D()(image))
    model = add_probabilities(keras.Model(image, keras.layers.Dense(3)(features)), 3)
    with pytest.raises(SpecError, match=r"contains onnx, but .* ONNX does not support Erfc\)\. Remove onnx"):
        export_model(model, ("a", "b", "c"), ("onnx",), resize, tmp_path)


def test_export_check_fails_if_a_file_does_not_load(tmp_path):
    model = add_probabilities(logits_model(2), 2)
    check_inputs(model, tmp_path / "inputs")
    (tmp_path / "model.keras").write_bytes(b"not a model")
    with pytest.raises(RuntimeError, match="The exported model cannot be loaded by a new process"):
        check_export(tmp_path, tmp_path / "inputs", ("keras",))


def test_sampled_indices_are_spread_over_the_split():
    assert spread_indices(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread_indices(101, 3).tolist() == [0, 50, 100]
    assert spread_indices(1, 3).tolist() == [0]
