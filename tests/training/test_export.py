"""Every export format, loaded by its own library in another process, predicts like the exported model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from topwork.data.images.decoding import Preprocessing
from topwork.data.images.resizing import resize
from topwork.errors import SpecError
from topwork.model.export import add_probabilities, export_model
from topwork.report import export_check, export_preflight
from topwork.report.export_check import CheckProcess, spread_indices, write_check_inputs
from topwork.report.export_preflight import check_exportable
from topwork.report.exported_model import LoadedModel, load_format
from topwork.report.rounding import MIN_LOGIT_TOLERANCE, estimate_logit_tolerance, logit_differences
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer

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


def logits_model_with(activation):
    image = keras.Input((32, 32, 3), name="image")
    features = keras.layers.Activation(activation)(keras.layers.GlobalAveragePooling2D()(image))
    return keras.Model(image, keras.layers.Dense(3)(features))


def raise_missing_input(images):
    """What onnxruntime says about some files that were written without an error."""
    raise RuntimeError("Required inputs (['classifier/Sub/y:0']) are missing from input feed (['image']).")


def check_inputs(model, directory):
    """Write inputs for the export check: 12 random images, half of them also as PNG files."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    probabilities = model(images.astype(np.float32), training=False).numpy()
    encoded = [(index, tf.io.encode_png(images[index]).numpy()) for index in range(0, 12, 2)]
    tolerance = estimate_logit_tolerance(model, images)
    write_check_inputs(directory, images, probabilities, probabilities.argmax(axis=1), encoded, tolerance)
    return probabilities


@pytest.mark.parametrize(("classes", "temperature"), [(2, None), (3, 0.7)])
def test_every_format_predicts_like_the_model_and_tampering_is_detected(classes, temperature, tmp_path, capfd):
    logits = logits_model(classes)
    model = add_probabilities(logits, classes, temperature)
    probabilities = check_inputs(model, tmp_path / "inputs")
    if temperature:
        expected = tf.nn.softmax(logits(np.load(tmp_path / "inputs/images.npy").astype(np.float32)) / temperature)
        np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-6)
    version = tmp_path / "version"
    version.mkdir()
    files = export_model(model, ("a", "b", "ünïcode")[:classes], FORMATS, Preprocessing(), version)
    assert capfd.readouterr().out == ""
    assert files == ("model.keras", "saved_model.pb", "model.tflite", "model.onnx")
    if classes == 2:  # one check in a new process is enough
        with CheckProcess() as process:
            result = process.check(version, tmp_path / "inputs", FORMATS)
        assert (result.images, result.encoded_images) == (12, 6)
        assert set(result.largest_difference) == {*FORMATS, "encoded"}
        assert set(result.accuracy.values()) == {1.0}
    else:
        differences = export_check.compare_predictions(version, tmp_path / "inputs", FORMATS).largest_difference
        assert max(differences.values()) < 1e-5
        _tamper(model)
        model.save(version / "model.keras")
        result = export_check.compare_predictions(version, tmp_path / "inputs", FORMATS)
        assert result.largest_logit_difference["keras"] > result.logit_tolerance
        assert result.largest_logit_difference["savedModel"] < result.logit_tolerance
        assert result.largest_difference["savedModel"] < 1e-5


def _tamper(model):
    model.set_weights([weights * 1.05 for weights in model.get_weights()])


def test_saved_model_accepts_images_and_files_of_any_size(tmp_path):
    model = add_probabilities(logits_model(3), 3)
    export_model(model, ("a", "b", "ünïcode"), ("savedModel",), Preprocessing(), tmp_path)
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
    export_model(model, ("a", "b"), ("savedModel",), Preprocessing(), tmp_path)
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
    export_model(published, ("a", "b", "c"), ("keras", "tflite"), Preprocessing(), tmp_path)
    np.testing.assert_allclose(load_format(tmp_path, "tflite").predict(images), published(images).numpy(), atol=1e-5)


def deep_model(classes, policy):
    """Twelve layers with BatchNorm, and logits of up to 60, as after long training."""
    keras.utils.set_random_seed(7)
    image = keras.Input((24, 24, 3), name="image")
    features = keras.layers.Rescaling(1 / 255, name="input_scaling")(image)
    for index in range(12):
        features = keras.layers.Conv2D(12, 3, padding="same", use_bias=False, dtype=policy)(features)
        features = keras.layers.BatchNormalization(dtype=policy, name=f"norm_{index}")(features)
        features = keras.layers.Activation("relu", dtype=policy)(features)
    vector = keras.layers.GlobalAveragePooling2D(dtype=policy)(features)
    model = keras.Model(image, keras.layers.Dense(1 if classes == 2 else classes, dtype="float32")(vector))
    scale_logits(model, 20.0)
    return model


def scale_logits(model, deviation):
    """Give the batch normalization realistic statistics, and the logits a standard deviation."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(IMAGES.astype(np.float32), training=True)
    logits, (kernel, bias) = model(IMAGES.astype(np.float32)).numpy(), model.layers[-1].get_weights()
    factor = deviation / logits.std()
    model.layers[-1].set_weights([kernel * factor, bias - factor * logits.mean(axis=0)])


IMAGES = np.random.default_rng(9).integers(0, 256, (24, 24, 24, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("classes", "policy"), [(2, "float32"), (12, "float32"), (12, "mixed_bfloat16"), (2, "mixed_float16")]
)
def test_rounding_is_accepted_and_wrong_exports_are_not(classes, policy, tmp_path):
    model = add_probabilities(deep_model(classes, policy), classes)
    tolerance = estimate_logit_tolerance(model, IMAGES)
    expected = model(IMAGES.astype(np.float32)).numpy()
    names = [str(index) for index in range(classes)]
    export_model(
        model, names, ("tflite",), Preprocessing(), tmp_path
    )  # XNNPACK folds batch normalization, and sums otherwise
    predict = load_format(tmp_path, "tflite").predict
    assert logit_differences(predict(IMAGES), expected).max() < tolerance / 3
    blurred = tf.image.resize(tf.image.resize(IMAGES, (20, 20)), (24, 24)).numpy()
    wrong = {
        "missing scaling": predict(IMAGES / 255),
        "another resize": predict(blurred),
        "truncated instead of rounded": predict(IMAGES.astype(np.float32) - 0.5),
        "BGR instead of RGB": predict(IMAGES[..., ::-1]),
        "another order of classes": np.roll(expected, 1, axis=1),
    }
    differences = {fault: logit_differences(actual, expected).max() for fault, actual in wrong.items()}
    assert {fault for fault, difference in differences.items() if difference < 3 * tolerance} == set()


def test_estimating_the_tolerance_leaves_the_weights_unchanged():
    model = add_probabilities(logits_model(3), 3)
    before = model.get_weights()
    estimate_logit_tolerance(model, np.zeros((2, 32, 32, 3), np.uint8))
    for value, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_wrong_export_of_many_classes_is_detected_although_every_probability_is_small():
    random = np.random.default_rng(0)
    logits = 0.1 * random.standard_normal((4, 20_000))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    actual = np.roll(expected, 1, axis=1)
    assert np.abs(actual - expected).max() < 1e-4
    assert logit_differences(actual.astype(np.float32), expected.astype(np.float32)).max() > 0.1


@pytest.mark.parametrize("confidence", [0.5, 1 - 1e-6, 1.0])
def test_rounding_of_probabilities_is_no_difference_of_logits(confidence):
    first = np.float32(confidence)
    expected = np.array([[first, 1 - first]], np.float32)
    actual = np.array([[np.nextafter(first, np.float32(0)), 1 - np.nextafter(first, np.float32(0))]], np.float32)
    assert logit_differences(actual, expected).max() <= MIN_LOGIT_TOLERANCE


def test_saturated_probability_hides_no_large_difference_of_logits():
    expected, actual = np.array([[1.0, 1e-20]], np.float32), np.array([[0.999, 0.001]], np.float32)
    assert logit_differences(actual, expected).max() > 1


def test_unsupported_format_is_reported(tmp_path, monkeypatch):
    model = add_probabilities(logits_model(2), 2)

    def raise_export_error(*arguments, **named):
        raise ValueError("no converter for Frobnicate\nand pages more")

    monkeypatch.setattr(model, "export", raise_export_error)
    with pytest.raises(SpecError) as raised:
        export_model(model, ("a", "b"), ("onnx",), Preprocessing(), tmp_path)
    assert str(raised.value) == (
        "spec.publish.formats contains onnx, but this model cannot be exported as onnx (ValueError: no converter for "
        "Frobnicate). Leave onnx out of spec.publish.formats."
    )


def test_operation_unsupported_by_onnx_is_reported(tmp_path):
    model = add_probabilities(logits_model_with("gelu"), 3)
    with pytest.raises(SpecError, match=r"contains onnx, but .* ONNX does not support Erfc\)\. Leave onnx out"):
        export_model(model, ("a", "b", "c"), ("onnx",), Preprocessing(), tmp_path)


def test_message_about_an_unsupported_format_is_short(tmp_path, monkeypatch):
    model = add_probabilities(logits_model(2), 2)

    def raise_export_error(*arguments, **named):
        raise ValueError("graph " * 20_000)

    monkeypatch.setattr(model, "save", raise_export_error)
    with pytest.raises(SpecError, match="cannot be exported as keras") as raised:
        export_model(model, ("a", "b"), ("keras",), Preprocessing(), tmp_path)
    assert len(str(raised.value)) < 400


def test_full_disk_is_not_reported_as_an_unsupported_format(tmp_path, monkeypatch):
    model = add_probabilities(logits_model(2), 2)

    def raise_disk_full(*arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "export", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        export_model(model, ("a", "b"), ("tflite",), Preprocessing(), tmp_path)


@pytest.fixture
def gelu_base(tmp_path):
    """A saved base with an operation that ONNX does not have."""
    image = keras.Input((32, 32, 3))
    path = tmp_path / "gelu.keras"
    features = keras.layers.Activation("gelu")(keras.layers.Conv2D(4, 3, strides=4)(image))
    keras.Model(image, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(features))).save(path)
    return {"base": {"saved": {"uri": str(path)}}, "head": {"dropout": 0.0}}


def test_unsupported_format_fails_before_training(make_job, workspace, gelu_base):
    job = make_job(model=gelu_base, transfer={"epochs": 1, "batchSize": 8}, publish={"formats": ["keras", "onnx"]})
    dataset = pull(job, workspace)
    with pytest.raises(SpecError, match=r"contains onnx, but .* \(ValueError: ONNX does not .*\)\. Leave onnx out of "):
        transfer(job, dataset, workspace)
    assert list(workspace.storage.list("stages/")) == []
    assert not list(workspace.scratch.glob("export-*"))


def test_format_added_after_transfer_fails_before_fine_tuning(make_job, workspace, gelu_base):
    settings = {
        "model": gelu_base,
        "transfer": {"epochs": 1, "batchSize": 8},
        "fineTune": {"epochs": 1, "unfreeze": "all"},
    }
    job = make_job(**settings, publish={"formats": ["keras"]})
    dataset = pull(job, workspace)
    classifier = transfer(job, dataset, workspace)
    before = {stored.key for stored in workspace.storage.list("stages/")}
    changed = make_job(**settings, publish={"formats": ["onnx"]})
    assert transfer(changed, dataset, workspace) == classifier
    with pytest.raises(SpecError, match="Leave onnx out of "):
        fine_tune(changed, classifier, dataset, workspace)
    assert {stored.key for stored in workspace.storage.list("stages/")} == before


def test_format_added_before_a_resume_is_checked(make_job, workspace):
    workspace.storage.write("stages/transfer/k/runs/r/checkpoints/00001/manifest.json", b"{}")

    def check(formats):
        check_exportable(
            make_job(publish={"formats": formats}),
            lambda: logits_model_with("gelu"),
            ("a", "b", "c"),
            workspace,
            architecture="resumed",
            attempt_prefix="stages/transfer/k/runs/r",
        )

    check(["keras", "savedModel"])
    with pytest.raises(SpecError, match="Leave onnx out"):
        check(["keras", "onnx"])


def test_file_that_its_library_cannot_run_fails_before_training(make_job, workspace, monkeypatch):
    monkeypatch.setattr(
        export_preflight, "load_format", lambda folder, name: LoadedModel(raise_missing_input, (32, 32))
    )
    with pytest.raises(
        SpecError, match=r"cannot be exported as tflite \(RuntimeError: Required inputs .*Leave tflite out"
    ):
        check_exportable(
            make_job(publish={"formats": ["tflite"]}),
            lambda: logits_model(3),
            ("a", "b", "c"),
            workspace,
            architecture="unloadable",
            attempt_prefix="stages/transfer/none/runs/r",
        )


def test_export_check_fails_if_a_file_does_not_load(tmp_path):
    model = add_probabilities(logits_model(2), 2)
    check_inputs(model, tmp_path / "inputs")
    (tmp_path / "model.keras").write_bytes(b"not a model")
    with (
        CheckProcess() as process,
        pytest.raises(RuntimeError, match="The exported model cannot be loaded by a new process"),
    ):
        process.check(tmp_path, tmp_path / "inputs", ("keras",))


def test_sampled_indices_are_spread_over_the_split():
    assert spread_indices(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread_indices(101, 3).tolist() == [0, 50, 100]
    assert spread_indices(1, 3).tolist() == [0]
