"""A run that publishes nothing ends with the metrics of its kept weights on the validation split."""

import keras
import numpy as np
import pytest
from tests.training.observer import RunObserver

from topwork import pipeline
from topwork.data.local_dataset import fetch_dataset
from topwork.registry.stage_results import read_run_result
from topwork.registry.versions import list_models
from topwork.stages.publish import find_outcome
from topwork.stages.pull import pull
from topwork.stages.validate import Validated

TRIAL = {"publish": {"enabled": False}, "evaluate": {"metrics": ["top5", "accuracy", "calibrationError"]}}


def test_run_without_publishing_ends_with_its_metrics_on_the_validation_split(make_job, workspace):
    job = make_job(**TRIAL)
    outcome = pipeline.run(job, workspace)
    assert isinstance(outcome, Validated)
    classifier = read_run_result(workspace.storage, job.run, "transfer")
    path = workspace.scratch / "classifier.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    split = fetch_dataset(pull(job, workspace), job, workspace).validation
    logits = keras.models.load_model(path, compile=False).predict(
        split.load_images(np.arange(split.size)).astype("float32"), verbose=0
    )
    second = 1 / (1 + np.exp(-logits[:, 0]))  # one logit for two classes
    own = np.where(split.labels == 1, second, 1 - second)
    assert list(outcome.metrics) == ["accuracy", "calibrationError", "loss"]
    assert outcome.metrics["loss"] == pytest.approx(-np.log(own).mean(), rel=1e-4)
    assert outcome.metrics["accuracy"] == np.mean((second > 0.5) == split.labels)
    assert (outcome.images, outcome.weights) == (split.size, classifier.kept)
    assert list(outcome.undefined) == ["top5"]
    summary = "\n".join(outcome.summary())
    assert f"loss {outcome.metrics['loss']:.4f} on 8 images of the validation split; nothing is published" in summary
    assert "top5 is not reported: the model has only 2 classes" in summary
    assert list_models(workspace.storage) == {}


def test_result_identifies_the_images_of_lists(make_job, workspace, two_class_folder):
    names = sorted(str(path.relative_to(two_class_folder)) for path in two_class_folder.rglob("*.*"))
    splits = {"train": names[::2], "validation": names[1::4], "test": names[3::4]}
    dataset = make_job().spec.dataset.model_dump(mode="json", by_alias=True, exclude_unset=True)
    dataset["splits"] = {name: {"list": f"{workspace.storage.uri}/{name}.txt"} for name in splits}
    results = []
    for first in (0, 1):
        for name, images in splits.items():
            workspace.storage.write(f"{name}.txt", "\n".join(images[first:]).encode())
        results.append(pipeline.run(make_job(dataset=dataset, **TRIAL), workspace).dataset.split("#"))
    (one, lists), (other, changed) = results
    assert one == other == pull(make_job(dataset=dataset), workspace).prefix
    assert lists != changed


def test_validated_run_is_found_again_until_its_metrics_change(make_job, workspace):
    job = make_job(**TRIAL)
    outcome = pipeline.run(job, workspace)
    observer = RunObserver()
    observer.observe_log()
    dataset = pull(job, workspace)
    assert find_outcome(job, dataset, workspace) == pipeline.run(job, workspace) == outcome
    changed = make_job(**TRIAL | {"evaluate": {"metrics": ["f1"]}}).as_run(job.run)
    assert find_outcome(changed, dataset, workspace) is None
    other = pipeline.run(changed, workspace)
    assert list(other.metrics) == ["f1", "loss"]
    assert other.metrics["loss"] == outcome.metrics["loss"]
    assert "epoch" not in [event for event, _ in observer.events]
    # The same weights can be published later.
    published = pipeline.run(make_job().as_run(job.run), workspace)
    assert published.version == 1
    assert "epoch" not in [event for event, _ in observer.events]
