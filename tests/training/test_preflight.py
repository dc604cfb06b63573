"""Checks before training: splits, batch sizes and replicas that a stage cannot train with are rejected."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from structlog.testing import capture_logs

from topwork.errors import DataError, SpecError
from topwork.spec.optimizer import Optimizer
from topwork.spec.training import EarlyStopping
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.feature_cache.policy import FeatureCachePolicy
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan
from topwork.training.preflight import check_metrics, check_replicas
from topwork.training.trainer import train


def with_splits(dataset, **slices):
    return {**dataset.model_dump(by_alias=True, mode="json", exclude_unset=True), "splits": slices}


REJECTED = [
    (
        {"dataset": {"train": "train[:6]", "validation": "train[6:]"}, "transfer": {"batchSize": 8}},
        "The training split has 6 images, fewer than spec.transfer.batchSize 8: it does not fill one batch. Use a "
        "batchSize of at most 6, or more images in spec.dataset.splits.train.",
    ),
    (
        {
            "dataset": {"train": "train[:10]", "validation": "train[10:]"},
            "fineTune": {"epochs": 1, "unfreeze": "all", "batchSize": 16, "optimizer": {"learningRate": 1e-5}},
        },
        "The training split has 10 images, fewer than spec.fineTune.batchSize 16: it does not fill one batch. Use a "
        "batchSize of at most 10, or more images in spec.dataset.splits.train.",
    ),
    (
        {"dataset": {"train": "train[1:]", "validation": "train[:1]"}},
        "The validation split contains no image of {missing}. Enlarge spec.dataset.splits.validation, use fractions, "
        "such as train: 0.8, which divide every class, remove the class from the source, or evaluate without it: "
        "spec.dataset.onMissingClass: allow.",
    ),
    (
        {"dataset": {"train": "train[1:]", "test": "train[:1]"}},
        "The test split contains no image of {missing}. Enlarge spec.dataset.splits.test, use fractions, such "
        "as train: 0.8, which divide every class, remove the class from the source, or evaluate without it: "
        "spec.dataset.onMissingClass: allow.",
    ),
    (
        {"dataset": {"train": "train[:1]", "validation": "train[1:]"}, "transfer": {"batchSize": 1}},
        "The training split contains no image of {missing}. Enlarge spec.dataset.splits.train, use fractions, such "
        "as train: 0.8, which divide every class, or remove the class from the source.",
    ),
    (
        {"dataset": {"train": "train[:39]", "validation": "train[40:]"}},
        "spec.dataset.splits.validation: train[40:] is empty: train has 40 images. Widen the slice.",
    ),
]


@pytest.mark.parametrize(
    ("changes", "expected"),
    REJECTED,
    ids=["batch", "batch-of-fine-tune", "class-validation", "class-test", "class-train", "empty"],
)
def test_unsuitable_splits_are_rejected_before_training(make_job, workspace, changes, expected):
    changes = {"transfer": {"batchSize": 2}, **changes}
    transfer_settings = {"train": "all", "epochs": 1, "featureCache": "off", **changes["transfer"]}
    dataset = with_splits(make_job().spec.dataset, **changes["dataset"])
    job = make_job(**{**changes, "dataset": dataset, "transfer": transfer_settings})
    with pytest.raises(DataError) as raised:
        stored = pull(job, workspace)
        fine_tune(job, transfer(job, stored, workspace), stored, workspace)
    assert str(raised.value) in {expected.replace("{missing}", name) for name in ("blue", "red")}
    assert not [stored.key for stored in workspace.storage.list() if "/checkpoints/" in stored.key]


def test_source_with_one_class_or_without_valid_images_is_rejected_before_training(
    make_job, workspace, two_class_folder
):
    job = make_job()
    for path in (two_class_folder / "red").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"50\.0% of the images of .* are invalid, more than spec\.dataset\.maxRejectedRatio"
    ):
        pull(job, workspace)
    for path in (two_class_folder / "blue").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"No image of the split train is valid\. 40 rejected: blue/00\.jpg"):
        pull(job, workspace)
    for path in (two_class_folder / "red").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="contains only one class, blue, but a classifier needs at least two"):
        pull(job, workspace)


def test_early_stopping_without_a_validation_split_is_rejected(make_job, workspace):
    phases = (TrainingPhase("all", 1, Optimizer()),)
    plan = TrainingPlan("transfer", phases, 8, "auto", False, EarlyStopping(), 1, FeatureCachePolicy())
    job = make_job(dataset=with_splits(make_job().spec.dataset, train="train[:60%]", test="train[60%:]"))
    with pytest.raises(SpecError, match="earlyStopping of transfer monitors the validation split, but"):
        train(StageContext(job, plan, "0123456789abcdef", workspace), pull(job, workspace), lambda: None, [])


@pytest.mark.parametrize(
    ("batch_size", "settings", "message"),
    [
        (10, {}, "batchSize 10 is not a multiple of the 4 replicas. Use 8."),
        (3, {}, "batchSize 3 is not a multiple of the 4 replicas. Use 4."),
        (
            8, {"gradient_accumulation_steps": 2},
            "optimizer.gradientAccumulationSteps is 2, but with 4 replicas Keras crashes (keras#20582). "
            "Remove it or train on one GPU.",
        ),
    ],
)  # fmt: skip
def test_settings_unsupported_with_several_replicas_are_rejected(batch_size, settings, message):
    with pytest.raises(SpecError) as error:
        check_replicas(4, batch_size, Optimizer(**settings))
    assert str(error.value) == message
    check_replicas(1, batch_size, Optimizer(**settings))


@pytest.mark.parametrize("clipping", ["clipnorm", "global_clipnorm", "clipvalue"])
def test_clipping_is_supported_with_several_replicas(clipping):
    check_replicas(4, 8, Optimizer(**{clipping: 1.0}))


def splits_of(classes, *, validation=None, test=None):
    """Splits with given labels; the metrics of a job depend only on these."""
    labels = {name: None if labels is None else np.array(labels) for name, labels in (("v", validation), ("t", test))}
    validation, test = (None if labels[name] is None else SimpleNamespace(labels=labels[name]) for name in "vt")
    return SimpleNamespace(class_names=tuple("abcdefg"[:classes]), validation=validation, test=test)


TOP5 = "is 1 for every model, because the dataset has only {} classes: the true class is always among the five most"
AUC = "is undefined, because the {0} split has images of only one class. Enlarge spec.dataset.splits.{0}, or"


@pytest.mark.parametrize(
    ("metric", "splits", "message"),
    [
        ("top5", splits_of(2, test=[0, 1]), TOP5.format(2)),
        ("top5", splits_of(5, validation=[0, 1]), TOP5.format(5)),
        ("auc", splits_of(2, test=[1, 1], validation=[0, 1]), AUC.format("test")),
        ("auc", splits_of(7, validation=[3]), AUC.format("validation")),
    ],
)
def test_metric_that_says_nothing_is_rejected_in_a_gate_and_otherwise_a_warning(make_job, metric, splits, message):
    metrics = ["accuracy", metric]
    gates = [{"metric": "accuracy", "atLeast": 0.5}, {"metric": metric, "atLeast": 0.9}]
    with pytest.raises(DataError, match=re.escape(f"spec.evaluate.gates.1: {metric} {message}")):
        check_metrics(make_job(evaluate={"metrics": metrics, "gates": gates}), splits)
    with capture_logs() as events:
        check_metrics(make_job(evaluate={"metrics": metrics}), splits)
    assert [(event["log_level"], event["metric"]) for event in events] == [("warning", metric)]
    assert message in events[0]["reason"]


def test_metrics_that_suit_the_dataset_are_accepted(make_job):
    names = ["accuracy", "top5", "auc"]
    gates = [{"metric": name, "atLeast": 0.5} for name in names]
    with capture_logs() as events:
        check_metrics(make_job(evaluate={"metrics": names, "gates": gates}), splits_of(6, test=[0, 5]))
    assert events == []


def test_gate_on_top5_of_two_classes_ends_the_job_before_training(make_job, workspace):
    gate = {"metric": "top5", "atLeast": 0.9}
    job = make_job(evaluate={"metrics": ["top5"], "gates": [gate]})
    with pytest.raises(DataError, match=r"spec\.evaluate\.gates\.0: top5 is 1 for every model"):
        transfer(job, pull(job, workspace), workspace)
    assert workspace.metrics.registry.get_sample_value("topwork_steps_total") == 0


def test_early_stopping_on_an_undefined_auc_is_rejected_before_transfer(make_job, workspace, two_class_folder):
    job = make_job(
        dataset={
            **with_splits(make_job().spec.dataset, train="train[1:]", validation="train[:1]"),
            "onMissingClass": "allow",
        },
        fineTune={"epochs": 1, "optimizer": {"learningRate": 1e-5}, "earlyStopping": {"monitor": "auc"}},
    )
    with pytest.raises(
        DataError, match=r"spec\.fineTune\.earlyStopping\.monitor is auc, which needs images of at least"
    ):
        transfer(job, pull(job, workspace), workspace)
    assert workspace.metrics.registry.get_sample_value("topwork_steps_total") == 0
