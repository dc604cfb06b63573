"""Results of the training stages: the stored classifier and its `done.json`, which marks a stage as complete."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage, describe_file
from topwork.errors import DataError
from topwork.workspace import Workspace

if TYPE_CHECKING:
    import keras

log = structlog.get_logger(__name__)

TrainingStage = Literal["transfer", "fine-tune"]
HistoryRow = dict[str, float | int | str]

MODEL_KEY = re.compile(r"runs/[^/]+/[^/]+/model-[0-9a-f]{16}\.keras")
"""Matches the keys that `model_key` returns."""


class ParameterCounts(BaseModel):
    """Number of trainable and frozen parameters of a classifier."""

    model_config = ConfigDict(frozen=True)

    trainable: int
    frozen: int


class Classifier(BaseModel):
    """A trained classifier in storage. `done.json` of its stage is this object as JSON.

    Attributes:
        stage: Stage that trained it.
        key: Storage key of the `.keras` file. The model maps raw pixels to logits.
        file: Size and digest of that file.
        class_names: Names of the classes, in the order of the labels.
        image_size: Height and width in pixels.
        history: One row per epoch of this stage and those before it: stage, epoch (from 1), loss, accuracy,
            validation_loss and validation_accuracy if there is a validation split, learning_rate, seconds,
            images_per_second, input_wait_seconds.
        best_epoch: Epoch of this stage whose weights were kept.
        parameters: Parameter counts at the end of the stage.
        started: Time at which the stage started for the first time.
        finished: Time at which its model was stored.
        seconds: Total duration of its epochs.
    """

    model_config = ConfigDict(frozen=True)

    stage: TrainingStage
    key: str
    file: FileEntry
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    history: list[HistoryRow]
    best_epoch: int
    parameters: ParameterCounts
    started: datetime
    finished: datetime
    seconds: float

    @property
    def rows(self) -> list[HistoryRow]:
        """History of this stage only."""
        return [row for row in self.history if row["stage"] == self.stage]


@dataclass(frozen=True)
class TrainingSummary:
    """Summary of a completed training stage; see the attributes of `Classifier`."""

    stage: TrainingStage
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    history: list[HistoryRow]
    best_epoch: int
    started: datetime


def stage_prefix(run: str, stage: TrainingStage) -> str:
    """Return the storage key prefix of all objects of a stage."""
    return f"runs/{run}/{stage}"


def model_key(run: str, stage: TrainingStage, file: FileEntry) -> str:
    """Return the storage key of the model that a stage trained.

    It contains the digest of the model, so that two processes that finish a stage at the same time cannot overwrite
    each other's model.
    """
    return f"{models_prefix(run, stage)}{file.sha256[:16]}.keras"


def models_prefix(run: str, stage: TrainingStage) -> str:
    """Return the common prefix of the keys of all models that a stage trained."""
    return f"{stage_prefix(run, stage)}/model-"


def read_stage_result(storage: Storage, run: str, stage: TrainingStage) -> Classifier | None:
    """Read the result of a completed stage.

    Args:
        storage: Storage of the job.
        run: Name of the run.
        stage: Name of the stage.

    Returns:
        The classifier; None if the stage is not complete.

    Raises:
        DataError: If `done.json` is not a stage result of topwork.

    Example:
        `read_stage_result(storage, job.run, "transfer")`
    """
    key = f"{stage_prefix(run, stage)}/done.json"
    data = storage.read(key)
    if data is None:
        return None
    try:
        return Classifier.model_validate_json(data)
    except ValidationError as error:
        raise DataError(
            f"{storage.uri_of(key)} is not a stage result of topwork: {error.errors()[0]['msg']}. "
            "Start over with --restart."
        ) from error


def write_stage_result(storage: Storage, run: str, classifier: Classifier) -> Classifier:
    """Mark a stage as complete. If two processes do so, the first one wins.

    Args:
        storage: Storage of the job.
        run: Name of the run.
        classifier: Result of the stage.

    Returns:
        The stored result, which may be that of another process.
    """
    key = f"{stage_prefix(run, classifier.stage)}/done.json"
    data = classifier.model_dump_json(indent=1).encode()
    if storage.write(key, data, only_if_absent=True, content_type="application/json"):
        return classifier
    return read_stage_result(storage, run, classifier.stage) or classifier


def store_stage_result(model: "keras.Model", summary: TrainingSummary, run: str, workspace: Workspace) -> Classifier:
    """Upload a trained model, then mark its stage as complete.

    Args:
        model: The classifier with its best weights.
        summary: Summary of the stage.
        run: Name of the run.
        workspace: Storage and scratch directory.

    Returns:
        The stored result, which is that of another process of the run if it completed the stage first.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    # Commands without TensorFlow import this module.
    from topwork.model.freezing import count_parameters

    storage, stage = workspace.storage, summary.stage
    if (stored := read_stage_result(storage, run, stage)) is not None:
        return stored
    path = workspace.scratch / f"{stage}.keras"
    _save_for_inference(model, path)
    file = describe_file(path)
    key = model_key(run, stage, file)
    storage.upload(path, key)
    path.unlink()
    groups = count_parameters(model)
    classifier = Classifier(
        stage=stage,
        key=key,
        file=file,
        class_names=summary.class_names,
        image_size=summary.image_size,
        history=summary.history,
        best_epoch=summary.best_epoch,
        parameters=ParameterCounts(
            trainable=sum(group.trainable for group in groups), frozen=sum(group.frozen for group in groups)
        ),
        started=summary.started,
        finished=datetime.now(UTC),
        seconds=sum(float(row["seconds"]) for row in summary.history if row["stage"] == stage),
    )
    result = write_stage_result(storage, run, classifier)
    # Delete models of processes that were killed before they stored their result, or that lost the race.
    models = list(storage.list(models_prefix(run, stage)))
    storage.delete(stored.key for stored in models if stored.key != result.key)
    return result


def _save_for_inference(model: "keras.Model", path: Path) -> None:
    """Save a float32 copy that was never compiled, so that the file contains no optimizer and no loss."""
    import keras

    from topwork.model.classifier import with_precision

    with_precision(keras.Model(model.inputs[0], model.outputs[0], name="classifier"), "float32").save(path)


def find_completed_stage(run: str, stage: TrainingStage, workspace: Workspace) -> Classifier | None:
    """Read the result of a completed stage and publish its metrics again, so that Prometheus still scrapes them.

    Args:
        run: Name of the run.
        stage: Name of the stage.
        workspace: Storage and metrics.

    Returns:
        The classifier; None if the stage is not complete.
    """
    classifier = read_stage_result(workspace.storage, run, stage)
    if classifier is not None:
        epochs, best_epoch = len(classifier.rows), classifier.best_epoch
        log.info("stage already complete", stage=stage, epochs=epochs, best_epoch=best_epoch)
        republish_metrics(classifier, workspace.metrics)
    return classifier


def report_metrics(rows: list[HistoryRow], best_epoch: int, metrics: Metrics) -> None:
    """Set the Prometheus metrics of a stage to its last and its best epoch.

    Args:
        rows: History of the stage so far.
        best_epoch: Epoch whose weights are kept, counted from 1.
        metrics: Prometheus metrics of the run.
    """
    for row in rows[-1:]:
        metrics.set_epoch(str(row["stage"]), int(row["epoch"]))
        metrics.set_learning_rate(float(row["learning_rate"]))
        for split, prefix in (("train", ""), ("validation", "validation_")):
            if (loss := row.get(f"{prefix}loss")) is not None:
                metrics.set_loss(split, float(loss))
            for name in ("accuracy", "auc"):
                if (value := row.get(f"{prefix}{name}")) is not None:
                    metrics.set_metric(name, split, float(value))
    for row in (row for row in rows if row["epoch"] == best_epoch):
        split = "validation" if "validation_accuracy" in row else "train"
        accuracy = float(row.get("validation_accuracy", row["accuracy"]))
        metrics.set_best_metric(str(row["stage"]), "accuracy", split, accuracy)


def republish_metrics(classifier: Classifier, metrics: Metrics) -> None:
    """Set all Prometheus metrics of a completed stage, so that its results are still scraped.

    Args:
        classifier: Result of the stage.
        metrics: Prometheus metrics of the run.
    """
    metrics.restore_stage(classifier.stage, classifier.started, classifier.finished)
    metrics.set_planned_epochs(classifier.stage, len(classifier.rows))
    metrics.set_parameters(classifier.parameters.trainable, classifier.parameters.frozen)
    report_metrics(classifier.rows, classifier.best_epoch, metrics)
