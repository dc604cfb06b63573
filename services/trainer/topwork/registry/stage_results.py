"""Results of the training stages, stored by key: the classifier and its `done.json`, which marks a stage as complete.

- `stages/<stage>/<key>/done.json`, `model-<digest>.keras`: the result, for every run with this key
- `stages/<stage>/<key>/last-checkpoint/…`: with `spec.compute.keepCheckpoint`, the state after its last epoch
- `stages/<stage>/<key>/runs/<run>/`: checkpoints and features of one run, until it is complete
- `runs/<run>/<stage>/done.json`: which result the run uses
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import structlog
from pydantic import BaseModel, ConfigDict

from topwork.artifacts import read_json_record
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.clients.s3.storage import FileEntry, Storage, describe_file
from topwork.registry.kept_weights import KeptWeights
from topwork.workspace import Workspace

if TYPE_CHECKING:
    import keras

log = structlog.get_logger(__name__)

TrainingStage = Literal["transfer", "fine-tune"]
TRAINING_STAGES: tuple[TrainingStage, ...] = ("transfer", "fine-tune")
REFERENCE_FORMAT = 2
HistoryRow = dict[str, float | int | str]

ROOT = "stages"
"""Key prefix of all results."""

MODEL_KEY = re.compile(r"(?:stages|runs)/[^/]+/[^/]+/model-[0-9a-f]{16}\.keras")
"""Matches the keys that `model_key` returns, and those of topwork 0.1, which stored models by run."""


class ParameterCounts(BaseModel):
    """Number of trainable and frozen parameters of a classifier."""

    model_config = ConfigDict(frozen=True)

    trainable: int
    frozen: int


class Classifier(BaseModel):
    """A trained classifier in storage. `done.json` of its stage is this object as JSON.

    Attributes:
        format: Version of this record.
        stage: Stage that trained it.
        key: Storage key of the `.keras` file. The model maps raw pixels to logits.
        file: Size and digest of that file.
        class_names: Names of the classes, in the order of the labels.
        image_size: Height and width in pixels.
        history: One row per epoch of this stage and those before it: stage, epoch (from 1), loss, accuracy,
            validation_loss and validation_accuracy if there is a validation split, learning_rate, seconds,
            images_per_second, input_wait_seconds.
        best_epoch: Epoch of this stage whose weights were kept; 0 if fine-tuning kept those of transfer.
        parameters: Parameter counts at the end of the stage.
        started: Time at which the stage started for the first time.
        finished: Time at which its model was stored.
        seconds: Total duration of its epochs.
        weights: Stage and epoch that the weights come from; None in results of topwork 0.1.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
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
    weights: KeptWeights | None = None

    @property
    def kept(self) -> KeptWeights:
        """Where the weights come from; in results of topwork 0.1 always from this stage."""
        return self.weights or KeptWeights(
            stage=self.stage, epoch=max(1, self.best_epoch), fine_tuned=self.stage == "fine-tune"
        )

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
    weights: KeptWeights | None = None


class StageReference(BaseModel):
    """The result that a run uses, stored as `runs/<run>/<stage>/done.json`.

    Attributes:
        format: Version of this record. In version 1, the record was the result itself.
        stage: The stage.
        key: Key of the result.
    """

    model_config = ConfigDict(frozen=True)

    format: int = REFERENCE_FORMAT
    stage: TrainingStage
    key: str


def result_prefix(stage: TrainingStage, key: str) -> str:
    """Return the storage key prefix of a stage result."""
    return f"{ROOT}/{stage}/{key}"


def attempt_prefix(stage: TrainingStage, key: str, run: str) -> str:
    """Return the storage key prefix of the intermediate files of one run.

    Two runs that compute the same result at the same time do not touch each other's checkpoints.
    """
    return f"{result_prefix(stage, key)}/runs/{run}"


def last_checkpoint_prefix(stage: TrainingStage, key: str, training_input: str) -> str:
    """Return the storage key prefix of the checkpoint that jobs with more epochs continue from.

    Args:
        stage: The stage.
        key: Key of its result.
        training_input: Digest of what it was trained on, which can depend on the machine.
    """
    return f"{result_prefix(stage, key)}/last-checkpoint/{training_input}"


def continued_prefix(stage: TrainingStage, continuation: str) -> str:
    """Return the common prefix of the keys of the records of all kept checkpoints with a continuation key."""
    return f"{ROOT}/{stage}/continued/{continuation}/"


def model_key(stage: TrainingStage, key: str, file: FileEntry) -> str:
    """Return the storage key of the model that a stage trained.

    It contains the digest of the model, so that two processes that finish a stage at the same time cannot overwrite
    each other's model.
    """
    return f"{models_prefix(stage, key)}{file.sha256[:16]}.keras"


def models_prefix(stage: TrainingStage, key: str) -> str:
    """Return the common prefix of the keys of all models that a stage trained."""
    return f"{result_prefix(stage, key)}/model-"


def read_stage_result(storage: Storage, stage: TrainingStage, key: str) -> Classifier | None:
    """Read the result of a completed stage.

    Args:
        storage: Storage of the job.
        stage: Name of the stage.
        key: Key of the result, from `topwork.registry.stage_keys`.

    Returns:
        The classifier; None if the stage is not complete.

    Raises:
        DataError: If `done.json` is not a stage result of topwork.

    Example:
        `read_stage_result(storage, "transfer", stage_keys(job, fingerprint, storage).transfer)`
    """
    name = f"{result_prefix(stage, key)}/done.json"
    data = storage.read(name)
    if data is None:
        return None
    return read_json_record(
        Classifier, data, storage.uri_of(name), "a stage result of topwork", "start over with --restart"
    )


def read_run_result(storage: Storage, run: str, stage: TrainingStage) -> Classifier | None:
    """Read the result of a stage that a run uses, by the name of the run only.

    Args:
        storage: Storage of the job.
        run: Name of the run.
        stage: Name of the stage.

    Returns:
        The classifier; None if the run has not completed the stage, or its result was deleted.
    """
    reference = read_reference(storage, run, stage)
    return read_stage_result(storage, stage, reference.key) if reference else None


def read_reference(storage: Storage, run: str, stage: TrainingStage) -> StageReference | None:
    """Read which result a run uses; None if the run has not completed the stage."""
    name = f"runs/{run}/{stage}/done.json"
    data = storage.read(name)
    if data is None:
        return None
    return read_json_record(
        StageReference, data, storage.uri_of(name), "a stage of a run", "start over with --restart", REFERENCE_FORMAT
    )


def write_reference(storage: Storage, run: str, stage: TrainingStage, key: str) -> None:
    """Record which result a run uses, so that it is found by the name of the run and is not garbage-collected."""
    data = StageReference(stage=stage, key=key).model_dump_json().encode()
    storage.write(f"runs/{run}/{stage}/done.json", data, content_type="application/json")


def write_stage_result(storage: Storage, key: str, classifier: Classifier) -> Classifier:
    """Mark a stage as complete. If two processes do so, the first one wins.

    Args:
        storage: Storage of the job.
        key: Key of the result.
        classifier: The result.

    Returns:
        The stored result, which may be that of another process.
    """
    name = f"{result_prefix(classifier.stage, key)}/done.json"
    data = classifier.model_dump_json(indent=1).encode()
    if storage.write(name, data, only_if_absent=True, content_type="application/json"):
        return classifier
    return read_stage_result(storage, classifier.stage, key) or classifier


def store_stage_result(
    model: "keras.Model", summary: TrainingSummary, key: str, workspace: Workspace, *, keep_in_memory: bool = False
) -> Classifier:
    """Upload a trained model, then mark its stage as complete.

    Args:
        model: The classifier with its best weights.
        summary: Summary of the stage.
        key: Key of the result.
        workspace: Storage and scratch directory.
        keep_in_memory: Whether this process evaluates the model next, so that it need not load it again.

    Returns:
        The stored result, which is that of another process if it completed a stage with the same key first.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    # Commands without TensorFlow import this module.
    from topwork.model.freezing import count_parameters

    storage, stage = workspace.storage, summary.stage
    if (stored := read_stage_result(storage, stage, key)) is not None:
        return stored
    path = workspace.scratch / f"{stage}.keras"
    inference_model = _to_inference_model(model)
    inference_model.save(path)
    file = describe_file(path)
    name = model_key(stage, key, file)
    storage.upload(path, name)
    path.unlink()
    if keep_in_memory:
        workspace.recent.keep("classifier", name, inference_model)
    groups = count_parameters(model)
    classifier = Classifier(
        stage=stage,
        key=name,
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
        weights=summary.weights,
    )
    result = write_stage_result(storage, key, classifier)
    # Delete models of processes that were killed before they stored their result, or that lost the race.
    with tolerate_cleanup_failure(f"unused models of {stage}"):
        models = list(storage.list(models_prefix(stage, key)))
        storage.delete(stored.key for stored in models if stored.key != result.key)
    return result


def _to_inference_model(model: "keras.Model") -> "keras.Model":
    """Return a float32 model that was never compiled, so that its file contains no optimizer and no loss."""
    import keras

    from topwork.model.classifier import with_precision

    return with_precision(keras.Model(model.inputs[0], model.outputs[0], name="classifier"), "float32")


def find_completed_stage(run: str, stage: TrainingStage, key: str, workspace: Workspace) -> Classifier | None:
    """Find the result of a stage that this or another run completed, and use it for this run.

    Its metrics are published again, so that Prometheus still scrapes them, and intermediate files of earlier attempts
    of this run are deleted.

    Args:
        run: Name of the run.
        stage: Name of the stage.
        key: Key of the result.
        workspace: Storage and metrics.

    Returns:
        The classifier; None if the stage is not complete. All nodes agree on that.
    """
    storage, nodes = workspace.storage, workspace.nodes
    # Another run can complete the stage at any moment.
    classifier = read_stage_result(storage, stage, key) if nodes.is_chief else None
    is_complete = nodes.broadcast(classifier is not None)
    if not nodes.is_chief and is_complete:
        return read_stage_result(storage, stage, key)
    if classifier is None:
        return None
    epochs, best_epoch = len(classifier.rows), classifier.best_epoch
    log.info("stage already complete", stage=stage, epochs=epochs, best_epoch=best_epoch)
    write_reference(storage, run, stage, key)
    delete_attempt(run, stage, key, storage)
    republish_metrics(classifier, workspace.metrics)
    return classifier


def delete_attempt(run: str, stage: TrainingStage, key: str, storage: Storage) -> None:
    """Delete the checkpoints and features of a run, after the stage was completed.

    Args:
        run: Name of the run.
        stage: Name of the stage.
        key: Key of the result.
        storage: Storage of the run.
    """
    with tolerate_cleanup_failure(f"checkpoints and features of {stage}"):
        storage.delete(stored.key for stored in list(storage.list(f"{attempt_prefix(stage, key, run)}/")))


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
    if not classifier.best_epoch and "accuracy" in (start := classifier.kept.start):
        metrics.set_best_metric(classifier.stage, "accuracy", "validation", start["accuracy"])
