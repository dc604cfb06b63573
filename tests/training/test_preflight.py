"""Checks before training: splits, batch sizes and replicas that a stage cannot train with are rejected."""

import pytest

from topwork.errors import DataError, SpecError
from topwork.spec.optimizer import Optimizer
from topwork.spec.training import EarlyStopping
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.feature_cache.policy import FeatureCachePolicy
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan
from topwork.training.preflight import check_replicas
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
        "The validation split contains no image of {missing}. Enlarge spec.dataset.splits.validation, use exact counts "
        "with splits.perClass, remove the class from the source, or evaluate without it: spec.dataset.onMissingClass: "
        "allow.",
    ),
    (
        {"dataset": {"train": "train[1:]", "test": "train[:1]"}},
        "The test split contains no image of {missing}. Enlarge spec.dataset.splits.test, use exact counts "
        "with splits.perClass, remove the class from the source, or evaluate without it: spec.dataset.onMissingClass: "
        "allow.",
    ),
    (
        {"dataset": {"train": "train[:1]", "validation": "train[1:]"}, "transfer": {"batchSize": 1}},
        "The training split contains no image of {missing}. Enlarge spec.dataset.splits.train, use exact counts "
        "with splits.perClass, or remove the class from the source.",
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
    assert not [stored.key for stored in workspace.storage.list(f"runs/{job.run}/") if "checkpoints" in stored.key]


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
        train(StageContext(job, plan, workspace), pull(job, workspace), lambda: None, [])


@pytest.mark.parametrize(
    ("batch_size", "settings", "message"),
    [
        (10, {}, "batchSize 10 is not a multiple of the 4 replicas. Use 8."),
        (3, {}, "batchSize 3 is not a multiple of the 4 replicas. Use 4."),
        (
            8, {"gradient_accumulation_steps": 2},
            "optimizer.gradientAccumulationSteps is 2, but with 4 replicas Keras crashes (keras#20582). "
            "Remove it or train on one GPU (clipnorm and clipvalue work everywhere).",
        ),
        (
            8, {"global_clipnorm": 1.0},
            "optimizer.globalClipnorm is 1.0, but with 4 replicas each replica clips before the gradients are summed. "
            "Remove it or train on one GPU (clipnorm and clipvalue work everywhere).",
        ),
    ],
)  # fmt: skip
def test_settings_unsupported_with_several_replicas_are_rejected(batch_size, settings, message):
    with pytest.raises(SpecError) as error:
        check_replicas(4, batch_size, Optimizer(**settings))
    assert str(error.value) == message
    check_replicas(1, batch_size, Optimizer(**settings))
