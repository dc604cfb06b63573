"""The publish stage, from a trained classifier to a published version."""

import csv
import dataclasses
import io
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from tests.training.stored_classifier import store_trained

from topwork.artifacts import read_manifest, write_artifact
from topwork.data.images.decoding import Preprocessing
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import GateError
from topwork.model.export import EXPORTED_FILES, add_probabilities, export_model
from topwork.registry import versions
from topwork.registry.versions import Version
from topwork.report import held_out_split
from topwork.report.gates import LatestVersion
from topwork.report.held_out_split import HeldOutSplit, graph_of
from topwork.report.latest_version import evaluate_latest
from topwork.stages import publish as publish_stage
from topwork.stages.publish import publish
from topwork.stages.pull import pull

HISTORY = [
    {"stage": "transfer", "epoch": 1, "loss": 0.7, "accuracy": 0.5, "validation_loss": 0.69},
    {"stage": "fine-tune", "epoch": 1, "loss": 0.6, "accuracy": 0.75},
]
UNMET_GATES = r"auc is [01]\.\d+, but the gate requires at most 0; f1 is 0\.\d+, but the gate requires at least 1\."
PREDICT_WITHOUT_TOPWORK = """
import json, sys
import keras, numpy as np, tensorflow as tf
directory, image, images = sys.argv[1:]
images = np.load(images)
served = tf.saved_model.load(directory)
encoded = served.signatures["encoded"](bytes=tf.constant([open(image, "rb").read()]))
print(json.dumps({
    "keras": keras.models.load_model(directory + "/model.keras").predict(images, verbose=0).tolist(),
    "image": served.signatures["serving_default"](image=tf.constant(images))["probabilities"].numpy().tolist(),
    "encoded": {name: value.numpy().astype(str).tolist() for name, value in encoded.items()},
}))
"""


def build_untrained_model():
    image = keras.Input((32, 32, 3), name="image")
    pixels = keras.layers.Rescaling(1 / 255)(image)
    base_input = keras.layers.Input((32, 32, 3))
    base = keras.Model(base_input, keras.layers.Conv2D(4, 3, activation="relu")(base_input), name="base")
    vector = keras.layers.GlobalAveragePooling2D()(base(pixels))
    return keras.Model(image, keras.layers.Dense(1, name="logits")(vector))


@pytest.fixture
def store_classifier(workspace, tmp_path):
    """Store a small model as the training result of a job."""

    def make(job, model=None):
        keras.utils.set_random_seed(1)
        return store_trained(model or build_untrained_model(), job, workspace, tmp_path, HISTORY)

    return make


NO_PREDICTIONS = None  # only a gate notWorseThanLatest needs those of the new model
GATED = {"metrics": ["accuracy", "f1"], "gates": [{"metric": "accuracy", "atLeastLatestMinus": 0.1}]}


def biased_model(red, image_size=(32, 32)):
    """A model that always predicts one class: red if `red` is positive, otherwise blue."""
    image = keras.Input((*image_size, 3), name="image")
    vector = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(0.0)(image))
    bias = keras.initializers.Constant(red)
    return keras.Model(image, keras.layers.Dense(1, name="logits", bias_initializer=bias)(vector))


def color_model(image_size=(32, 32), red_index=1, visible_columns=None):
    """A model that is always right on `two_class_folder`: it compares the red with the blue channel."""
    image = keras.Input((*image_size, 3), name="image")
    hidden_columns = image_size[1] - visible_columns if visible_columns else 0
    visible = keras.layers.Cropping2D(((0, 0), (0, hidden_columns)))(image)
    vector = keras.layers.GlobalAveragePooling2D()(visible)
    dense = keras.layers.Dense(1, name="logits")
    model = keras.Model(image, dense(vector))
    sign = 1.0 if red_index == 1 else -1.0
    dense.set_weights([np.array([[sign], [0.0], [-sign]], np.float32), np.zeros(1, np.float32)])
    return model


def publish_version(
    storage,
    folder,
    model,
    *,
    names=("blue", "red"),
    formats=("keras",),
    image_fit="stretch",
    weights="0a",
    stored=None,
    content=None,
    damaged=None,
    split="test",
):
    """Publish a version as an earlier run would have, with metrics that it measured on other images."""
    number = len(versions.list_versions(storage, "tiny")) + 1
    directory, prefix = folder / f"version-{number}", f"models/tiny/{number}"
    directory.mkdir()
    export_model(add_probabilities(model, len(names)), names, formats, Preprocessing(image_fit=image_fit), directory)
    for name in formats if content else ():
        (directory / EXPORTED_FILES[name]).write_bytes(content)
    (directory / "metrics.json").write_text(json.dumps({"evaluation": {"classNames": names}}))
    height, width = model.input_shape[1:3]
    (directory / "spec.yaml").write_text(f"spec: {{dataset: {{imageSize: [{height}, {width}]}}}}")
    facts = Version(
        name="tiny", version=number, uri=storage.uri_of(prefix), run="earlier-1", weights=weights,
        published="2026-01-01T00:00:00Z", main_metric="accuracy", metrics=stored or {"accuracy": 1.0}, split=split,
        images=5,
    )  # fmt: skip
    write_artifact(storage, prefix, directory, facts.model_dump(mode="json"))
    versions.update_latest(storage, "tiny")
    if damaged:
        storage.write(f"{prefix}/{damaged}", b"shortened")


@pytest.fixture
def held_out(make_job, workspace):
    """The test split of `two_class_folder`: eight images."""
    job = make_job()
    local = fetch_dataset(pull(job, workspace), job, workspace)
    return HeldOutSplit("test", local.test, local.class_names, 8, workspace)


@pytest.fixture
def evaluate_earlier_version(held_out, make_job, workspace, tmp_path):
    """Publish one more version and evaluate it on the test split of a job."""
    job = make_job(evaluate=GATED)

    def evaluate(model, **settings):
        publish_version(workspace.storage, tmp_path, model, **settings)
        latest = evaluate_latest(job, "0f", held_out, NO_PREDICTIONS, workspace.scratch / "latest")
        assert not (workspace.scratch / "latest").exists()
        return latest

    return evaluate


def test_latest_version_is_evaluated_on_the_images_of_this_job(evaluate_earlier_version):
    # The stored metrics of each version, from other images, say that it is always wrong.
    for number, name in enumerate(("keras", "savedModel", "tflite", "onnx"), 1):
        latest = evaluate_earlier_version(color_model((20, 24)), formats=(name,), stored={"accuracy": 0.0})
        assert (latest.version, latest.reason, latest.metrics["accuracy"]) == (f"tiny/{number}", "", 1.0)
    assert evaluate_earlier_version(biased_model(1.0)).metrics["accuracy"] < 1.0


def test_latest_version_resizes_the_images_of_this_job_as_it_was_trained(evaluate_earlier_version):
    # It sees only the left edge, which is black if the images of 40x36 pixels are padded.
    model = color_model(visible_columns=2)
    assert evaluate_earlier_version(model).metrics["accuracy"] == 1.0
    assert evaluate_earlier_version(model, image_fit="pad").metrics["accuracy"] < 1.0


def test_latest_version_may_have_another_order_of_classes(evaluate_earlier_version):
    latest = evaluate_earlier_version(color_model(red_index=0), names=("red", "blue"))
    assert latest.metrics["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"names": ("blue", "green")}, "it has other classes (only there: green; only in this dataset: red)"),
        ({"names": ("blue", "Red")}, "it has other classes (only there: Red; only in this dataset: red)"),
        ({"content": b"not a model"}, "model.keras cannot be loaded (ValueError: "),
        ({"formats": ("onnx",), "content": b"not a model"}, "model.onnx cannot be loaded (InvalidProtobuf: "),
        ({"damaged": "model.keras"}, "model.keras"),
        ({"split": "cross-validation"}, "it is the final model of cross-validation, trained on all images"),
    ],
)
def test_latest_version_that_cannot_be_evaluated_is_explained(make_job, workspace, tmp_path, settings, reason):
    publish_version(workspace.storage, tmp_path, color_model(), **settings)
    no_images = HeldOutSplit("test", None, ("blue", "red"), 8, workspace)
    latest = evaluate_latest(make_job(evaluate=GATED), "0f", no_images, NO_PREDICTIONS, workspace.scratch / "latest")
    assert latest.metrics is None
    assert reason in latest.reason


def test_latest_version_with_the_same_weights_is_not_evaluated(make_job, workspace, tmp_path):
    publish_version(workspace.storage, tmp_path, color_model(), weights="0f")
    no_images = HeldOutSplit("test", None, ("blue", "red"), 8, workspace)
    for evaluate, expected in (
        (GATED, LatestVersion(version="tiny/1", same_weights=True)),
        ({"metrics": ["accuracy"], "gates": [{"metric": "accuracy", "atLeast": 0.1}]}, None),
    ):
        job = make_job(evaluate=evaluate)
        assert evaluate_latest(job, "0f", no_images, NO_PREDICTIONS, tmp_path / "latest") == expected


def test_gate_compares_with_the_latest_version_on_the_same_images(
    make_job, store_classifier, workspace, tmp_path, export_check_in_process
):
    """The latest version has a stored accuracy of 0.2, but 1.0 on these images."""
    publish_version(workspace.storage, tmp_path, color_model(), stored={"accuracy": 0.2})
    job = make_job(evaluate=GATED, publish={"formats": ["keras"]})
    dataset, classifier = pull(job, workspace), store_classifier(job, biased_model(-1.0))
    with pytest.raises(
        GateError, match=r"the gate requires at least 0\.9000 \(1\.0000 of tiny/1 on the same images minus"
    ):
        publish(job, classifier, dataset, workspace)
    assert versions.list_versions(workspace.storage, "tiny") == {1: True}
    metrics = json.loads(workspace.storage.read(f"runs/{job.run}/metrics.json"))
    assert metrics["latest"]["metrics"]["accuracy"] == 1.0
    assert "tests" not in metrics["latest"]
    assert b"tiny/1, evaluated on the same images" in workspace.storage.read(f"runs/{job.run}/report.html")


def test_gate_tests_whether_the_model_is_worse_than_the_latest_version(
    make_job, store_classifier, workspace, tmp_path, export_check_in_process
):
    """The new model always predicts blue; the latest version is right on all eight images."""
    publish_version(workspace.storage, tmp_path, color_model())
    gates = [{"metric": name, "notWorseThanLatest": {"confidence": 0.9}} for name in ("accuracy", "auc")]
    job = make_job(evaluate={"metrics": ["accuracy", "auc"], "gates": gates}, publish={"formats": ["keras"]})
    dataset, classifier = pull(job, workspace), store_classifier(job, biased_model(-1.0))
    with pytest.raises(GateError) as raised:
        publish(job, classifier, dataset, workspace)
    metrics = json.loads(workspace.storage.read(f"runs/{job.run}/metrics.json"))
    lost = round(8 * (1 - metrics["metrics"]["accuracy"]))
    assert metrics["latest"]["tests"]["accuracy"] == {
        "images": 8, "pValue": pytest.approx(0.5**lost), "gained": 0, "lost": lost,
    }  # fmt: skip
    assert metrics["latest"]["tests"]["auc"]["pValue"] < 0.01
    expected = f"p = {0.5**lost:.2g}, confidence 0.9, 8 images, of which 0 are newly right and {lost} newly wrong"
    assert expected in str(raised.value)
    assert "auc is 0.5000, but the gate requires no significant decrease from 1.0000 of tiny/1" in str(raised.value)
    equal = publish(job, store_classifier(job, color_model()), dataset, workspace)
    assert equal.version == 2
    # The gate was checked when the version was published: it is the latest version itself now.
    assert publish(job, classifier, dataset, workspace) == equal


def test_large_split_is_predicted_twice_and_has_the_same_metrics(held_out, monkeypatch):
    held_out = dataclasses.replace(held_out, batch_size=3)
    forward, predicted = graph_of(add_probabilities(build_untrained_model(), 2)), []

    def count(images):
        predicted.append(len(images))
        return forward(images)

    expected, _ = held_out.evaluate(count, auc=False)
    assert sum(predicted) == 9  # 8 images, and one of padding
    monkeypatch.setattr(held_out_split, "MAX_KEPT_BYTES", 0)
    assert held_out.evaluate(count, auc=True)[0] == expected
    assert sum(predicted) == 27
    assert held_out.evaluate(count, auc=False)[0] == expected.model_copy(update={"auc": None})


def keys_below(storage, prefix):
    return sorted(stored.key for stored in storage.list(prefix))


def test_published_version_is_complete_and_loads_with_standard_libraries(
    make_job, store_classifier, workspace, two_class_folder, tmp_path
):
    job = make_job(publish={"formats": ["keras", "savedModel"]})
    dataset = pull(job, workspace)
    classifier = store_classifier(job)
    published = publish(job, classifier, dataset, workspace)
    storage = workspace.storage

    assert (published.name, published.version, published.uri) == ("tiny", 1, storage.uri_of("models/tiny/1"))
    assert published.summary()[0].startswith("Published tiny version 1: accuracy ")
    assert list(published.metrics) == ["accuracy", "f1", "auc", "loss"]
    manifest = read_manifest(storage, "models/tiny/1")
    assert manifest.facts == json.loads(storage.read("models/tiny/latest.json"))
    assert {name for name in manifest.files if not name.startswith("variables/")} == {
        "card.md", "fingerprint.pb", "history.csv", "labels.txt", "metrics.json", "model.keras",
        "evaluated-images.csv.gz", "preprocessing.json", "report.html", "saved_model.pb", "spec.yaml",
    }  # fmt: skip
    assert storage.read("models/tiny/1/labels.txt") == b"blue\nred\n"
    rows = list(csv.DictReader(io.StringIO(storage.read("models/tiny/1/history.csv").decode())))
    assert [(row["stage"], row["epoch"], row["validation_loss"]) for row in rows] == [
        ("transfer", "1", "0.69"),
        ("fine-tune", "1", ""),
    ]
    content = json.loads(storage.read("models/tiny/1/metrics.json"))
    assert content["version"] == 1
    assert content["recheck"]["images"] == content["evaluation"]["images"] == 8
    assert set(content["recheck"]["largestDifference"]) >= {"keras", "savedModel", "encoded"}
    assert max(content["recheck"]["largestDifference"].values()) <= content["recheck"]["tolerance"]
    assert max(content["recheck"]["largestLogitDifference"].values()) <= content["recheck"]["logitTolerance"] < 1e-3
    assert published.uri in storage.read("models/tiny/1/card.md").decode()
    assert b"data:image/jpeg;base64," in storage.read("models/tiny/1/report.html")

    _assert_same_probabilities_in_another_process(storage, classifier, two_class_folder / "red" / "01.png", tmp_path)

    before = keys_below(storage, "")
    assert publish(job, classifier, dataset, workspace) == published
    # As if the attempt had been killed right after it wrote its manifest.
    storage.delete(["models/tiny/latest.json", f"runs/{job.run}/publish/done.json"])
    again = publish(job, classifier, dataset, workspace)
    assert again.started > published.finished
    assert again == published.model_copy(update={"started": again.started, "finished": again.finished})
    assert keys_below(storage, "") == before


def test_published_version_states_how_it_resizes_images(make_job, store_classifier, workspace, export_check_in_process):
    dataset = {**make_job().spec.dataset.model_dump(by_alias=True, exclude_unset=True), "imageFit": "pad"}
    job = make_job(dataset=dataset, publish={"formats": ["keras", "savedModel"]})
    publish(job, store_classifier(job), pull(job, workspace), workspace)
    storage = workspace.storage
    assert json.loads(storage.read("models/tiny/1/preprocessing.json"))["imageFit"] == "pad"
    content = json.loads(storage.read("models/tiny/1/metrics.json"))
    assert content["imageFit"] == "pad"
    # Compared with images that were loaded as in training.
    assert content["recheck"]["largestLogitDifference"]["encoded"] <= content["recheck"]["logitTolerance"]
    for name in ("card.md", "report.html"):
        assert "centered on black" in storage.read(f"models/tiny/1/{name}").decode()


def _assert_same_probabilities_in_another_process(storage, classifier, image, tmp_path):
    from topwork.artifacts import download_artifact

    download_artifact(storage, "models/tiny/1", tmp_path / "model")
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    storage.download(classifier.key, tmp_path / "logits.keras")
    logits = keras.models.load_model(tmp_path / "logits.keras")(images).numpy()[:, 0]
    red = 1 / (1 + np.exp(-logits))
    expected = np.stack([1 - red, red], axis=1)
    command = [sys.executable, "-c", PREDICT_WITHOUT_TOPWORK, tmp_path / "model", image, tmp_path / "images.npy"]
    plain = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    np.testing.assert_allclose(plain["keras"], expected, atol=1e-6)
    np.testing.assert_allclose(plain["image"], expected, atol=1e-6)
    assert set(plain["encoded"]) == {"class", "probability", "classes", "probabilities"}
    assert plain["encoded"]["classes"] == [["blue", "red"]]


def test_unmet_gate_publishes_nothing_and_raises_the_same_error_again(
    make_job, store_classifier, workspace, export_check_in_process
):
    gates = [{"metric": "accuracy", "atLeast": 0.0}, {"metric": "auc", "atMost": 0.0}, {"metric": "f1", "atLeast": 1.0}]
    job = make_job(evaluate={"metrics": ["accuracy", "auc", "f1"], "gates": gates})
    dataset, classifier = pull(job, workspace), store_classifier(job)
    messages = []
    for _ in range(2):
        with pytest.raises(GateError, match=UNMET_GATES) as raised:
            publish(job, classifier, dataset, workspace)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert keys_below(workspace.storage, "models/") == []
    run_files = {key.removeprefix(f"runs/{job.run}/") for key in keys_below(workspace.storage, f"runs/{job.run}/")}
    assert run_files >= {"history.csv", "metrics.json", "report.html"}
    assert "publish/done.json" not in run_files
    metrics = json.loads(workspace.storage.read(f"runs/{job.run}/metrics.json"))
    assert [gate["met"] for gate in metrics["gates"]] == [True, False, False]


def test_attempt_killed_before_writing_its_manifest_is_completed(
    make_job, store_classifier, workspace, export_check_in_process, monkeypatch
):
    job = make_job(publish={"formats": ["keras"]})
    dataset, classifier = pull(job, workspace), store_classifier(job)

    class Killed(BaseException):
        pass

    def upload_some(storage, prefix, directory, facts):
        storage.upload(directory / "model.keras", f"{prefix}/model.keras")
        storage.write(f"{prefix}/variables/leftover", b"of an earlier format")
        raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(publish_stage, "write_artifact", upload_some)
        publish(job, classifier, dataset, workspace)
    assert versions.list_versions(workspace.storage, "tiny") == {1: False}
    assert versions.read_latest(workspace.storage, "tiny") is None

    assert publish(job, classifier, dataset, workspace).version == 1
    assert versions.list_versions(workspace.storage, "tiny") == {1: True}
    assert "models/tiny/1/variables/leftover" not in keys_below(workspace.storage, "models/tiny/1/")


def test_export_with_different_predictions_is_not_published(make_job, store_classifier, workspace, monkeypatch):
    from topwork.model import export

    job = make_job(publish={"formats": ["keras"]})
    dataset, classifier = pull(job, workspace), store_classifier(job)
    export_model = export.export_model

    def tampered(model, *others):
        copy = keras.models.clone_model(model)
        copy.set_weights([weights + 0.1 for weights in model.get_weights()])
        return export_model(copy, *others)

    monkeypatch.setattr(export, "export_model", tampered)
    with pytest.raises(
        RuntimeError, match=r"probabilities differ for keras by [0-9.e-]+ \(logits by [0-9.e-]+\).*; rounding"
    ):
        publish(job, classifier, dataset, workspace)
    assert keys_below(workspace.storage, "models/") == []


def test_report_says_which_split_of_the_source_was_replaced(
    make_job, store_classifier, workspace, two_class_folder, tmp_path, export_check_in_process
):
    (tmp_path / "tree").mkdir()
    two_class_folder.rename(tmp_path / "tree" / "Train")
    source = {"folder": {"uri": str(tmp_path / "tree")}}
    job = make_job(
        dataset={"source": source, "splits": "auto", "imageSize": [32, 32]},
        evaluate={"metrics": ["accuracy"], "gates": [{"metric": "accuracy", "atMost": 0.0}]},
    )
    with pytest.raises(GateError):
        publish(job, store_classifier(job, color_model()), pull(job, workspace), workspace)
    report = workspace.storage.read(f"runs/{job.run}/report.html").decode()
    for split in ("validation", "test"):
        assert f"The source has no {split} split. 10% of each class of its train split replace it." in report
    assert json.loads(workspace.storage.read(f"runs/{job.run}/metrics.json"))["evaluation"]["images"] == 4
