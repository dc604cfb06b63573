"""`topwork compare`: versions and runs on the same images."""

import dataclasses
import json
import re
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.conftest import BUCKET
from tests.training.test_publish import HISTORY, biased_model, color_model

from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError, SettingError
from topwork.pipeline import store_spec
from topwork.registry import versions
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import Classifier, ParameterCounts, write_reference, write_stage_result
from topwork.report import export_check
from topwork.report.comparison.candidates import read_run_candidate, read_version_candidate
from topwork.report.comparison.compare import compare_models
from topwork.report.statistics import bootstrap
from topwork.spec import TransferJob
from topwork.stages.publish import publish
from topwork.stages.pull import pull
from topwork.workspace import Workspace

SLICES = {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"}
FRACTIONS = {"train": 0.6, "validation": 0.2, "test": 0.2}


class Trainer:
    """Stores models as the results of jobs on a folder of red and blue images, without training."""

    def __init__(self, storage, folder):
        self.photos, self.scratch = folder / "photos", folder / "scratch"
        self.scratch.mkdir()
        self.comparisons = {}
        self.workspace = Workspace(storage, Metrics(), NoProgress(), self.scratch)
        self.add_images("first", 20)

    def add_images(self, prefix, count):
        random = np.random.default_rng(len(prefix))
        for channel, name in ((2, "blue"), (0, "red")):
            (self.photos / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = random.integers(0, 120, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(self.photos / name / f"{prefix}-{index:02}.png")

    def job(self, splits, epochs, **settings):
        source = {"folder": {"uri": str(self.photos)}}
        spec = {
            "storage": self.workspace.storage.uri,
            "dataset": {"source": source, "splits": splits, "imageSize": [32, 32]},
            "model": {"base": {"cnn": {"filters": [4]}}},
            "transfer": {"train": "all", "epochs": epochs, "batchSize": 8, "featureCache": "off"},
            "evaluate": {"metrics": ["accuracy", "f1", "auc", "calibrationError"]},
            "publish": {"formats": ["keras"]},
            "compute": {"gpus": 0},
            **settings,
        }
        meta = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "tiny"}}
        return TransferJob.model_validate({**meta, "spec": spec})

    def train(self, job, model):
        """Store a model as the result of a training; return the name of the run."""
        storage, dataset = self.workspace.storage, pull(job, self.workspace)
        store_spec(job, self.workspace)
        stage_key = stage_keys(job, dataset.metadata.fingerprint, storage).training
        path, key = self.scratch / "trained.keras", f"stages/transfer/{stage_key}/model.keras"
        model.save(path)
        now = "2030-01-02T03:04:05Z"
        classifier = Classifier(
            stage="transfer", key=key, file=storage.upload(path, key), class_names=("blue", "red"),
            image_size=(32, 32), history=[{**HISTORY[0], "seconds": 2.5, "images_per_second": 16.0}], best_epoch=1,
            parameters=ParameterCounts(trainable=1, frozen=0), started=now, finished=now, seconds=2.5,
        )  # fmt: skip
        write_stage_result(storage, stage_key, classifier)
        write_reference(storage, job.run, "transfer", stage_key)
        return job.run

    def publish(self, job, model):
        """Publish a model as the result of a job."""
        result = stage_keys(job, pull(job, self.workspace).metadata.fingerprint, self.workspace.storage).training
        self.train(job, model)
        classifier = Classifier.model_validate_json(self.workspace.storage.read(f"stages/transfer/{result}/done.json"))
        published = publish(job, classifier, pull(job, self.workspace), self.workspace)
        return versions.read_version(self.workspace.storage, published.name, published.version)

    def splits(self, candidate):
        return fetch_dataset(candidate.dataset, candidate.job, self.workspace)


@pytest.fixture(scope="module")
def trained(s3_settings, tmp_path_factory):
    """Versions 1 (always red) and 2 (always right) of the same splits, 3 of a larger dataset; a run and two trials."""
    storage = Storage(f"s3://{BUCKET}/{uuid.uuid4().hex[:12]}", s3_settings)
    trainer = Trainer(storage, tmp_path_factory.mktemp("compare"))
    with pytest.MonkeyPatch.context() as patch:
        process = SimpleNamespace(check=export_check.compare_predictions)
        patch.setattr(export_check.CheckProcess, "__init__", lambda _: None)
        patch.setattr(export_check.CheckProcess, "__enter__", lambda _: process)
        patch.setattr(export_check.CheckProcess, "__exit__", lambda *_: None)
        trainer.publish(trainer.job(SLICES, epochs=1), biased_model(1.0))
        trainer.publish(trainer.job(SLICES, epochs=3), color_model())
        trainer.run = trainer.train(trainer.job(SLICES, epochs=4), biased_model(-1.0))
        unpublished = {"publish": {"enabled": False}}
        trainer.trials = [
            trainer.train(trainer.job(SLICES, epochs=5, **unpublished), biased_model(1.0)),
            trainer.train(trainer.job(SLICES, epochs=6, **unpublished), color_model()),
        ]
        trainer.add_images("second", 15)
        trainer.publish(trainer.job(FRACTIONS, epochs=1), color_model())
    return trainer


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 100)


@pytest.fixture
def read(trained):
    """Read a candidate: a version by its number, or a run by its name."""
    storage = trained.workspace.storage

    def read_candidate(name):
        if isinstance(name, str):
            return read_run_candidate(storage, name)
        return read_version_candidate(storage, versions.read_version(storage, "tiny", name))

    return read_candidate


@pytest.fixture
def compare(trained, read, few_resamples):
    """Compare models by their names; each comparison is computed once."""

    def run(*names):
        if names not in trained.comparisons:
            trained.comparisons[names] = compare_models([read(name) for name in names], trained.workspace)
        return trained.comparisons[names]

    return run


def test_versions_are_compared_on_the_same_test_images(trained, read, compare):
    comparison, images = compare(1, 2)
    test = trained.splits(read(1)).test
    blue = sorted(name for name, label in zip(test.names, test.labels, strict=True) if label == 0)
    assert 0 < len(blue) < images.size == comparison.images == test.size == 8
    assert (comparison.described, comparison.split) == ("8 images of the test split of tiny/1", "test")
    first, second = comparison.models
    assert (first.name, second.name) == ("tiny/1", "tiny/2")
    assert first.metrics["accuracy"].value == pytest.approx(1 - len(blue) / 8)
    assert second.metrics["accuracy"].low == pytest.approx(0.6756, abs=1e-4)  # Wilson interval of 8 of 8
    assert second.metrics["f1"].model_dump() == {"value": 1.0, "low": None, "high": None}  # no resample has a mistake
    assert first.metrics["f1"].low < first.metrics["f1"].value < first.metrics["f1"].high
    (difference,) = comparison.differences
    assert (difference.newly_correct, difference.newly_misclassified) == (len(blue), 0)
    assert sorted(image.name for image in difference.correct_images) == blue
    changes = {(image.true_class, image.before, image.after) for image in difference.correct_images}
    assert changes == {("blue", "red", "blue")}
    assert difference.p_value == difference.corrected_p_value == pytest.approx(2 * 0.5 ** len(blue))
    assert difference.metrics["accuracy"].value == pytest.approx(len(blue) / 8)
    assert (difference.spec, difference.dataset) == (("spec.transfer.epochs: 1 → 3",), "")
    assert [
        note
        for note in comparison.notes
        if "fewer than 30 images: the intervals of all metrics except accuracy and top5 may" in note
    ]


def test_metrics_of_a_version_are_those_that_it_published(trained, read, compare):
    comparison, _ = compare(1, 2)
    assert comparison == compare_models([read(1), read(2)], trained.workspace)[0]
    for number, model in enumerate(comparison.models, 1):
        published = read(number).model.metrics
        assert set(model.metrics) == {"accuracy", "f1", "auc", "calibrationError", "loss"}
        assert {name: estimate.value for name, estimate in model.metrics.items()} == pytest.approx(
            {name: published[name] for name in model.metrics}
        )


def test_p_values_of_several_models_are_corrected(trained, compare):
    comparison, _ = compare(1, 2, trained.run)
    assert [other.name for other in comparison.differences] == ["tiny/2", trained.run]
    assert comparison.split == "test"
    smaller, larger = sorted(comparison.differences, key=lambda other: other.p_value)
    assert smaller.corrected_p_value == pytest.approx(min(1.0, 2 * smaller.p_value))
    assert larger.corrected_p_value == pytest.approx(max(larger.p_value, smaller.corrected_p_value))


def test_cost_is_that_of_the_training(trained, compare):
    comparison, _ = compare(1, trained.run)
    for model in comparison.models:
        assert [stage.model_dump() for stage in model.stages] == [
            {"stage": "transfer", "epochs": 1, "seconds": 2.5, "step_seconds": 0.5, "batch_size": 8}
        ]
        assert (model.gpus, model.images) == (0, {"train": 24, "validation": 8, "test": 8})
        assert model.model_bytes > 1000


def test_images_that_another_model_was_trained_on_are_left_out(trained, read, compare):
    old, new = (trained.splits(read(number)) for number in (1, 3))
    used = {*new.train.digests.tolist(), *new.validation.digests.tolist()}
    fair = [digest for digest in old.test.digests.tolist() if digest not in used]
    assert 0 < len(fair) < 8
    comparison, images = compare(1, 3)
    assert images.digests.tolist() == fair
    assert f"Of 8 images, {8 - len(fair)} because of tiny/3 are left out" in comparison.notes[0]
    assert comparison.differences[0].dataset == "30 images added"


def test_trials_are_compared_on_the_validation_images(trained, read, compare):
    comparison, images = compare(*trained.trials)
    assert comparison.split == "validation"
    assert images.digests.tolist() == trained.splits(read(1)).validation.digests.tolist()
    assert comparison.models[1].metrics["accuracy"].value == 1.0


def test_metrics_that_may_be_optimistic_are_reported(trained, read, few_resamples):
    leaky = dataclasses.replace(read(1), model=read(1).model.model_copy(update={"duplicates": 2}))
    settings = {"evaluate": {"metrics": ["accuracy"], "calibration": "temperature"}, "publish": {"enabled": False}}
    trial = read(trained.trials[1])
    trial = dataclasses.replace(trial, job=trained.job(SLICES, epochs=6, **settings).as_run(trial.name))
    version = dataclasses.replace(read(2), job=trained.job(SLICES, epochs=3, evaluate=settings["evaluate"]))
    comparison, _ = compare_models([leaky, trial, version], trained.workspace)
    assert comparison.notes[2:5] == (
        "2 of the 8 images on which tiny/1 was published have a near duplicate among its training images, so its "
        "metrics may be optimistic.",
        f"{trial.name} is a trial, so its probabilities are not calibrated.",
        "The validation split fitted the temperature of tiny/2, so its loss and calibration error are optimistic.",
    )
    # Each metric that one of the jobs requests is shown for all.
    assert comparison.models[1].metrics.keys() == {"accuracy", "f1", "auc", "calibrationError", "loss"}


def test_models_of_other_classes_are_refused(trained, read):
    metadata = read(2).dataset.metadata.model_copy(update={"class_names": ("blue", "green")})
    renamed = dataclasses.replace(read(2), dataset=dataclasses.replace(read(2).dataset, metadata=metadata))
    with pytest.raises(DataError, match=r"^tiny/2 cannot be compared with tiny/1: it has other classes \(only there: "):
        compare_models([read(1), renamed], trained.workspace)


def test_splits_that_cannot_be_selected_again_are_refused(trained, read):
    swapped = trained.job({"train": "train[40%:]", "validation": "train[20%:40%]", "test": "train[:20%]"}, epochs=1)
    with pytest.raises(DataError, match=r"^tiny/1 cannot be compared: this topwork selects other test images than"):
        compare_models([dataclasses.replace(read(1), job=swapped), read(2)], trained.workspace)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "cross-validation"}, "it is the final model of cross-validation, trained on all images."),
        ({"dataset": ""}, "it was published by an older topwork, which did not record its dataset."),
        ({"dataset": "datasets/photos/0a"}, f"its dataset s3://{BUCKET}/"),
    ],
)
def test_version_that_cannot_be_compared_is_explained(trained, read, changes, reason):
    version = read(1).model.model_copy(update=changes)
    with pytest.raises(DataError, match=re.escape(f"tiny/1 cannot be compared: {reason}")):
        read_version_candidate(trained.workspace.storage, version)


def test_published_run_is_its_version(read):
    assert read(read(1).job.run) == read(1)


def test_run_that_cannot_be_compared_is_explained(trained, read):
    storage = trained.workspace.storage
    run = trained.train(trained.job(FRACTIONS, epochs=7), color_model())
    written = storage.read(f"runs/{trained.run}/transfer/done.json")
    for content, reason in (
        (written, "its dataset, the lists of its splits, or its base have changed since"),
        (
            written.replace(json.loads(written)["key"].encode(), b"0a" * 8),
            "its training is not complete, or its results were deleted",
        ),
    ):
        storage.write(f"runs/{run}/transfer/done.json", content)
        with pytest.raises(DataError, match=f"^{run} cannot be compared: {reason}"):
            read(run)
    with pytest.raises(SettingError, match=r"has no run tiny-00000000\. Use the name"):
        read("tiny-00000000")


def test_command_prints_text_or_json_and_writes_a_report(command, trained, tmp_path, few_resamples):
    uri, page = f"{trained.workspace.storage.uri}/models/tiny", tmp_path / "comparison.html"
    text = command("compare", f"{uri}/1", "models/tiny/2", "--html", page, "--state", tmp_path).output
    lines = text.splitlines()
    changed = int(re.search(r"\ntiny/2 against tiny/1: (\d) newly correct, 0 newly misclassified of 8 ", text)[1])
    assert lines[0] == "Compared on 8 images of the test split of tiny/1."
    header = next(line for line in lines if line.startswith("METRIC"))
    assert header.split() == ["METRIC", "tiny/1", "tiny/2", "DIFFERENCE"]
    assert {"  spec.transfer.epochs: 1 → 3", "  dataset: the same", "  newly correct:"} <= set(lines)
    assert page.read_text().count("data:image/jpeg;base64,") == changed
    assert "<script" not in page.read_text()
    result = json.loads(command("compare", f"{uri}/1", f"{uri}/2", "--json", "--state", tmp_path).output)
    assert [model["name"] for model in result["models"]] == ["tiny/1", "tiny/2"]
    assert [len(result["differences"][0][key]) for key in ("correctImages", "misclassifiedImages")] == [changed, 0]


def test_models_of_the_same_name_have_the_names_of_their_storages(command, trained, tmp_path, few_resamples):
    storage, other = (trained.workspace.storage.at(trained.workspace.storage.uri + suffix) for suffix in ("", "-copy"))
    for prefix in ("datasets/", "stages/", f"runs/{trained.run}/"):
        for stored in storage.list(prefix):
            other.write(stored.key, storage.read(stored.key))
    uris = [f"{where.uri}/runs/{trained.run}" for where in (storage, other)]
    result = json.loads(command("compare", *uris, "--json", "--state", tmp_path).output)
    assert [model["name"] for model in result["models"]] == uris
    assert (result["images"], result["differences"][0]["newlyCorrect"]) == (8, 0)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["{uri}/models/tiny/1"], "Got one model. Expected at least two to compare."),
        (["{uri}/models/tiny/1", "models/tiny/1"], "{uri}/models/tiny/1 is listed twice. Name different models."),
        (["tiny/1", "tiny/2"], "tiny/1 is neither a published model nor a run. Use a URI such as s3://bucket/"),
        (["{uri}/models/tiny/1", "tiny-1"], "{uri}/tiny-1 is neither a published model nor a run."),
        (["{uri}/models/tiny/1", "models/other/1"], "{uri} has no model other."),
    ],
)
def test_command_explains_wrong_arguments(command, trained, tmp_path, models, message):
    uri = trained.workspace.storage.uri
    with pytest.raises(SettingError) as raised:
        command("compare", *(model.format(uri=uri) for model in models), "--state", tmp_path)
    assert str(raised.value).startswith(message.format(uri=uri))
