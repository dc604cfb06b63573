"""What a training stage hands to the next, and keeps in storage as its `done.json`."""

import re
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import FileEntry, Storage
from topwork.errors import DataError

TrainingStage = Literal["transfer", "fine-tune"]
Row = dict[str, float | int | str]

MODEL = re.compile(r"runs/[^/]+/[^/]+/model-[0-9a-f]{16}\.keras")
"""What `model_key` gives."""


class Parameters(BaseModel):
    """How many parameters were trained, and how many kept."""

    model_config = ConfigDict(frozen=True)

    trainable: int
    frozen: int


class Classifier(BaseModel):
    """A trained classifier in storage.

    Attributes:
        stage: The stage that trained it.
        key: The `.keras` file in storage: raw pixels in, logits out.
        file: Its size and digest.
        class_names: Names of the classes, in the order of the labels.
        image_size: Height and width in pixels.
        history: One row an epoch, of this stage and those before it: stage, epoch (from 1), loss, accuracy,
            validation_loss and validation_accuracy where there's a validation split, learning_rate, seconds,
            images_per_second, input_wait_seconds.
        best_epoch: Epoch of this stage whose weights were kept.
        parameters: Counts at the end of the stage.
        started: When the stage was first started.
        finished: When its model was stored.
        seconds: Time that its epochs took.
    """

    model_config = ConfigDict(frozen=True)

    stage: TrainingStage
    key: str
    file: FileEntry
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    history: list[Row]
    best_epoch: int
    parameters: Parameters
    started: datetime
    finished: datetime
    seconds: float

    @property
    def rows(self) -> list[Row]:
        """The history of this stage alone."""
        return [row for row in self.history if row["stage"] == self.stage]


def stage_prefix(run: str, stage: TrainingStage) -> str:
    """Key of everything that a stage keeps in storage."""
    return f"runs/{run}/{stage}"


def model_key(run: str, stage: TrainingStage, file: FileEntry) -> str:
    """Key of the model that a stage made.

    Named by its content: two processes that end a stage at the same time can't replace each other's model.
    """
    return f"{models_prefix(run, stage)}{file.sha256[:16]}.keras"


def models_prefix(run: str, stage: TrainingStage) -> str:
    """Beginning of the keys of all models that a stage made."""
    return f"{stage_prefix(run, stage)}/model-"


def read_done(storage: Storage, run: str, stage: TrainingStage) -> Classifier | None:
    """Find what a finished stage made.

    Returns:
        The classifier; None if the stage is not done.

    Raises:
        DataError: If `done.json` is none of topwork's.
    """
    key = f"{stage_prefix(run, stage)}/done.json"
    data = storage.read(key)
    if data is None:
        return None
    try:
        return Classifier.model_validate_json(data)
    except ValidationError as error:
        raise DataError(
            f"{storage.uri_of(key)} isn't what a finished stage of topwork leaves: {error.errors()[0]['msg']}. "
            "Start over with --restart."
        ) from error


def write_done(storage: Storage, run: str, classifier: Classifier) -> Classifier:
    """Mark a stage as done; of two writers the first one wins.

    Returns:
        The classifier that stands.
    """
    key = f"{stage_prefix(run, classifier.stage)}/done.json"
    data = classifier.model_dump_json(indent=1).encode()
    if storage.write(key, data, only_if_absent=True, content_type="application/json"):
        return classifier
    return read_done(storage, run, classifier.stage) or classifier


def tell(rows: list[Row], best_epoch: int, metrics: Metrics) -> None:
    """Set the series that tell how a stage does.

    Args:
        rows: History of the stage so far.
        best_epoch: The epoch whose weights are kept, counted from 1.
        metrics: Where they go.
    """
    for row in rows[-1:]:
        metrics.epoch(str(row["stage"]), int(row["epoch"]))
        metrics.learning_rate(float(row["learning_rate"]))
        for split, prefix in (("train", ""), ("validation", "validation_")):
            if (loss := row.get(f"{prefix}loss")) is not None:
                metrics.loss(split, float(loss))
            for name in ("accuracy", "auc"):
                if (value := row.get(f"{prefix}{name}")) is not None:
                    metrics.metric(name, split, float(value))
    for row in (row for row in rows if row["epoch"] == best_epoch):
        split = "validation" if "validation_accuracy" in row else "train"
        metrics.best(str(row["stage"]), "accuracy", split, float(row.get("validation_accuracy", row["accuracy"])))


def repeat(classifier: Classifier, metrics: Metrics) -> None:
    """Set all series of a finished stage, so that its results are still scraped.

    Args:
        classifier: What the stage made.
        metrics: Where they go.
    """
    metrics.repeat_stage(classifier.stage, classifier.started, classifier.finished)
    metrics.epochs_planned(classifier.stage, len(classifier.rows))
    metrics.parameters(classifier.parameters.trainable, classifier.parameters.frozen)
    tell(classifier.rows, classifier.best_epoch, metrics)
