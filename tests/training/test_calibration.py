"""Jobs with calibrated probabilities: the temperature is fitted on validation and part of every export."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tests.training.stored_classifier import store_trained

from topwork.artifacts import download_artifact
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import GateError
from topwork.model.calibration import fit_temperature
from topwork.report.exported_model import load_format
from topwork.report.held_out_evaluation import describe_final_model, evaluate_classifier
from topwork.report.predictor import Predictor, validate_file
from topwork.stages.publish import publish
from topwork.stages.pull import pull

pytestmark = pytest.mark.usefixtures("export_check_in_process")


@pytest.fixture
def confusable_folder(tmp_path):
    """`<tmp>/confusable/{blue,red}/*`: 50 gray images per class, those of red a little brighter on average."""
    random = np.random.default_rng(0)
    root = tmp_path / "confusable"
    for brightness, name in ((100, "blue"), (130, "red")):
        (root / name).mkdir(parents=True)
        for index in range(50):
            gray = np.clip(random.normal(brightness, 20) + random.normal(0, 10, (32, 32, 1)), 0, 255)
            Image.fromarray(gray.repeat(3, axis=2).astype(np.uint8)).save(root / name / f"{index:03}.png")
    return root


@pytest.fixture
def calibrated_job(make_job, confusable_folder):
    """Build a job that calibrates; keyword arguments replace top-level keys of `spec`."""

    def make(calibration="temperature", splits=None, **overrides):
        splits = splits or {"train": 0.2, "validation": 0.4, "test": 0.4}
        source = {"folder": {"uri": str(confusable_folder)}}
        evaluate = {"metrics": ["accuracy", "auc", "calibrationError"], "calibration": calibration}
        dataset = {"source": source, "splits": splits, "imageSize": [32, 32]}
        return make_job(dataset=dataset, **{"evaluate": evaluate, **overrides})

    return make


def brightness_model(slope):
    """Sees feature maps of the brightness; an image brighter than 115 is red. A high slope makes it overconfident."""
    image = keras.Input((32, 32, 3), name="image")
    pixels = keras.Input((32, 32, 3))
    convolution = keras.layers.Conv2D(1, 1, name="brightness")
    base = keras.Model(pixels, convolution(pixels), name="base")
    logits = keras.layers.Dense(1, name="logits")
    model = keras.Model(image, logits(keras.layers.GlobalAveragePooling2D(name="pooling")(base(image))))
    convolution.set_weights([np.full((1, 1, 3, 1), 1 / 3, np.float32), np.zeros(1, np.float32)])
    logits.set_weights([np.array([[slope]], np.float32), np.array([-115 * slope], np.float32)])
    return model


def read_json(storage, key):
    return json.loads(storage.read(key))


def test_published_model_divides_the_logits_by_the_temperature(calibrated_job, workspace, tmp_path, confusable_folder):
    job, model = calibrated_job(), brightness_model(1.0)  # test_export.py exports every format
    dataset = pull(job, workspace)
    publish(job, store_trained(model, job, workspace, tmp_path), dataset, workspace)
    local = fetch_dataset(dataset, job, workspace)
    validation = local.validation.load_images(np.arange(40)).astype(np.float32)
    temperature = fit_temperature(model(validation).numpy(), local.validation.labels)
    assert temperature > 5
    metrics = read_json(workspace.storage, "models/tiny/1/metrics.json")
    assert metrics["calibration"]["temperature"] == pytest.approx(temperature, rel=1e-5)
    assert metrics["calibration"]["images"] == 40

    download_artifact(workspace.storage, "models/tiny/1", tmp_path / "version")
    test = local.test.load_images(np.arange(40))
    red = tf.sigmoid(model(test.astype(np.float32)).numpy()[:, 0] / temperature).numpy()
    np.testing.assert_allclose(load_format(tmp_path / "version", "keras").predict(test)[:, 1], red, atol=1e-5)
    file = confusable_folder / local.test.names[0]
    predicted = Predictor(tmp_path / "version").probabilities([validate_file(file.read_bytes())])
    np.testing.assert_allclose(predicted[0, 1], red[0], atol=1e-5)


def test_metrics_are_those_of_the_calibrated_model_and_the_classes_stay_the_same(calibrated_job, workspace, tmp_path):
    evaluations = {}
    for calibration in ("none", "temperature"):
        job = calibrated_job(calibration)
        classifier = store_trained(brightness_model(1.0), job, workspace, tmp_path)
        published = publish(job, classifier, pull(job, workspace), workspace)
        evaluations[calibration] = read_json(workspace.storage, f"models/tiny/{published.version}/metrics.json")
    before, after = evaluations["none"], evaluations["temperature"]
    assert before["calibration"] is None
    uncalibrated = after["calibration"]["before"]
    assert uncalibrated["loss"] == pytest.approx(before["metrics"]["loss"], rel=1e-6)
    assert uncalibrated["calibrationError"] == pytest.approx(before["metrics"]["calibrationError"], rel=1e-6)
    assert len(uncalibrated["reliability"]) == len(before["evaluation"]["reliability"])
    assert 0.5 < after["metrics"]["accuracy"] == before["metrics"]["accuracy"] < 1
    assert after["evaluation"]["confusion"] == before["evaluation"]["confusion"]
    # Saturated probabilities are equal before calibration.
    assert after["metrics"]["auc"] == pytest.approx(before["metrics"]["auc"], abs=0.02)
    assert after["metrics"]["loss"] < 0.5 * before["metrics"]["loss"]
    assert after["metrics"]["calibrationError"] < before["metrics"]["calibrationError"]
    report = workspace.storage.read("models/tiny/2/report.html").decode()
    sentence = f"changed the loss from {before['metrics']['loss']:.4f} to {after['metrics']['loss']:.4f}"
    assert "before calibration" in report
    assert sentence in report
    assert sentence.replace("_", "\\_") in workspace.storage.read("models/tiny/2/card.md").decode()
    assert "before calibration" not in workspace.storage.read("models/tiny/1/report.html").decode()


def test_gate_compares_the_same_weights_with_another_calibration(calibrated_job, workspace, tmp_path):
    # Saturated probabilities are equal without calibration.
    evaluate = {"metrics": ["auc"], "gates": [{"metric": "auc", "atLeastLatestMinus": 0.0}]}
    calibrated, job = calibrated_job(), calibrated_job(evaluate=evaluate)
    classifier = store_trained(brightness_model(1.0), job, workspace, tmp_path)
    for _ in range(2):  # the second time, the latest version is the model itself
        publish(calibrated, classifier, pull(calibrated, workspace), workspace)
    with pytest.raises(GateError, match=r"auc is 0\.\d+, but the gate requires at least 0\.\d+ \(0\.\d+ of tiny/1"):
        publish(job, classifier, pull(job, workspace), workspace)


def test_model_without_mistakes_on_validation_is_published_uncalibrated_with_a_warning(
    calibrated_job, make_job, workspace, tmp_path, caplog
):
    job = make_job(evaluate={"metrics": ["accuracy"], "calibration": "temperature"})  # colors that are easy to tell
    image = keras.Input((32, 32, 3), name="image")
    dense = keras.layers.Dense(1, name="logits")
    model = keras.Model(image, dense(keras.layers.GlobalAveragePooling2D()(image)))
    dense.set_weights([np.array([[0.1], [0.0], [-0.1]], np.float32), np.zeros(1, np.float32)])
    publish(job, store_trained(model, job, workspace, tmp_path), pull(job, workspace), workspace)
    calibration = read_json(workspace.storage, "models/tiny/1/metrics.json")["calibration"]
    assert (calibration["temperature"], calibration["before"]) == (None, None)
    assert "The probabilities are not calibrated" in workspace.storage.read("models/tiny/1/report.html").decode()
    assert "The probabilities are not calibrated" in caplog.text
    names = [layer.name for layer in _published_model(workspace, tmp_path).layers]
    assert "temperature" not in names


def _published_model(workspace, tmp_path):
    workspace.storage.download("models/tiny/1/model.keras", tmp_path / "published.keras")
    return keras.models.load_model(tmp_path / "published.keras")


def test_metrics_on_validation_are_reported_as_optimistic_and_mistakes_have_heat_maps(
    calibrated_job, workspace, tmp_path
):
    job = calibrated_job(splits={"train": 0.5, "validation": 0.5})
    classifier = store_trained(brightness_model(1.0), job, workspace, tmp_path)
    (folder := tmp_path / "evaluate").mkdir()
    results = evaluate_classifier(job, classifier, pull(job, workspace), workspace, folder).results
    assert results.evaluation.split == "validation"
    assert len(results.mistakes) > 3
    assert all(mistake.heat_uri.startswith("data:image/jpeg;base64,") for mistake in results.mistakes)
    assert "judged by the last feature maps, of 32x32" in results.heat_note
    assert any(note.startswith("The temperature was fitted on the images on which") for note in results.notes)


def test_final_model_of_cross_validation_is_calibrated_on_its_own_validation_split(calibrated_job, workspace, tmp_path):
    job = calibrated_job(splits={"folds": 2, "validation": 0.4}, publish={"fold": "all", "formats": ["keras"]})
    fold, dataset = job.with_fold(1), pull(job, workspace)
    classifier = store_trained(brightness_model(1.0), job, workspace, tmp_path)
    for name in ("fold", "final"):
        (tmp_path / name).mkdir()
    validated = evaluate_classifier(fold, classifier, dataset, workspace, tmp_path / "fold").results
    final = describe_final_model(
        job, classifier, dataset, workspace, tmp_path / "final", dataclasses.replace(validated, calibration=None)
    )
    assert final.results.calibration.images == validated.calibration.images == 40
    assert final.results.calibration.temperature != validated.calibration.temperature
    assert final.results.calibration.before is None
    scale = final.model.get_layer("temperature").scale
    assert scale == pytest.approx(1 / final.results.calibration.temperature)
