"""The publish stage, from a trained classifier to a published version."""

import csv
import io
import json
import subprocess
import sys
from datetime import UTC, datetime

import keras
import numpy as np
import pytest

from topwork.artifacts import read_manifest
from topwork.errors import GateError
from topwork.registry import versions
from topwork.registry.stage_results import Classifier, ParameterCounts
from topwork.report import export_check
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
def export_check_in_process(monkeypatch):
    """Run the export check in this process: a new process takes seconds to start and is tested elsewhere."""
    monkeypatch.setattr(export_check, "check_export", export_check.compare_predictions)


@pytest.fixture
def store_classifier(workspace, tmp_path):
    """Store a small model as the training result of a job."""

    def make(job):
        keras.utils.set_random_seed(1)
        model = build_untrained_model()
        path = tmp_path / "trained.keras"
        model.save(path)
        key = f"runs/{job.run}/transfer/model.keras"
        return Classifier(
            stage="transfer",
            key=key,
            file=workspace.storage.upload(path, key),
            class_names=("blue", "red"),
            image_size=(32, 32),
            history=HISTORY,
            best_epoch=1,
            parameters=ParameterCounts(trainable=1, frozen=0),
            started=datetime.now(UTC),
            finished=datetime.now(UTC),
            seconds=1.0,
        )

    return make


def keys_below(storage, prefix):
    return sorted(stored.key for stored in storage.list(prefix))


def test_published_version_is_complete_and_loads_with_standard_libraries(
    make_job, store_classifier, workspace, two_class_folder, tmp_path
):
    job = make_job()
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
        "card.md", "fingerprint.pb", "history.csv", "labels.txt", "metrics.json", "model.keras", "report.html",
        "saved_model.pb", "spec.yaml",
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
    assert set(content["recheck"]["largestDifference"]) == {"keras", "savedModel", "encoded"}
    assert max(content["recheck"]["largestDifference"].values()) <= content["recheck"]["tolerance"] == 1e-4
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


def test_unmet_gate_publishes_nothing_and_raises_the_same_error_again(make_job, store_classifier, workspace):
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
    with pytest.raises(RuntimeError, match=r"probabilities differ for keras by [0-9.e-]+; at most 0.0001 is accepted"):
        publish(job, classifier, dataset, workspace)
    assert keys_below(workspace.storage, "models/") == []
