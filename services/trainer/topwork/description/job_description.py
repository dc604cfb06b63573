"""Data model of a job description, the output of `topwork describe`."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from topwork.spec.training import EarlyStopping


class _DescriptionModel(BaseModel):
    """Base class: frozen, with camelCase JSON keys."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)


class LayerGroupCount(_DescriptionModel):
    """Trainable and frozen parameters of a group of layers."""

    layers: str
    trainable: int
    frozen: int


class LearningRate(_DescriptionModel):
    """Learning rate of a phase.

    Attributes:
        peak: Value in the spec.
        schedule: Name of the schedule.
        first: Value at the first step; None if the number of steps is unknown and the rate is not constant.
        last: Value at the last step; None likewise.
    """

    peak: float
    schedule: str
    first: float | None
    last: float | None


class PhaseDescription(_DescriptionModel):
    """A training phase: epochs with the same trainable layers and the same optimizer.

    Attributes:
        trained: Description of the trained layers.
        epochs: Maximum number of epochs.
        steps: Maximum number of steps; None if the number of images is unknown.
        optimizer: Optimizer settings, as in the spec.
        learning_rate: Learning rate of the phase.
        layers: Layer groups of the base, from input to output, and the head; empty if the base is unavailable.
        trainable: Number of trainable parameters; None if the base is unavailable.
        frozen: Number of frozen parameters; None likewise.
    """

    trained: str
    epochs: int
    steps: int | None
    optimizer: dict[str, Any]
    learning_rate: LearningRate
    layers: tuple[LayerGroupCount, ...]
    trainable: int | None
    frozen: int | None


class CacheDescription(_DescriptionModel):
    """Use of the feature cache, if there is enough space.

    Attributes:
        used: Whether features of the frozen layers are computed once instead of every epoch.
        views: Augmented views of each training image; 0 if unused.
        reason: Why the cache is used or not.
    """

    used: bool
    views: int
    reason: str


class StageDescription(_DescriptionModel):
    """A training stage.

    Attributes:
        stage: Name of the stage.
        batch_size: Global batch size.
        steps_per_epoch: Number of full batches; None if the number of images is unknown.
        epochs: Maximum number of epochs.
        steps: Maximum number of steps; None if the number of images is unknown.
        loss: Name of the Keras loss, or the value in the spec if the number of classes is unknown.
        balanced: Whether class weights are balanced.
        early_stopping: Early stopping settings.
        feature_cache: Use of the feature cache; None if the base is unavailable.
        phases: Training phases in order.
    """

    stage: str
    batch_size: int
    steps_per_epoch: int | None
    epochs: int
    steps: int | None
    loss: str
    balanced: bool
    early_stopping: EarlyStopping | None
    feature_cache: CacheDescription | None
    phases: tuple[PhaseDescription, ...]


class BaseDescription(_DescriptionModel):
    """The base of the classifier.

    Attributes:
        kind: application, saved or cnn.
        name: Name of the application, or URI of the saved model.
        weights: Origin of the weights.
        input_size: Height and width in pixels.
        image_fit: How images with another aspect ratio are resized, as in the spec.
        scaling: Scaling of raw pixels.
        parameters: Number of parameters; None if the base is unavailable.
    """

    kind: str
    name: str
    weights: str
    input_size: tuple[int, int]
    image_fit: str
    scaling: str
    parameters: int | None


class DataDescription(_DescriptionModel):
    """Known facts about the images; see `KnownDataset`."""

    classes: int | None
    images: dict[str, int | None]
    dataset: str | None


class PlanDescription(_DescriptionModel):
    """Which stages a run would reuse, because storage has their results.

    Attributes:
        run: Name of the run of `topwork run`; None if it does not depend on the dataset.
        reuses: Stages with a stored result.
        runs: Stages without one.
        changes: How the source has changed since it was used before; empty if it has not.
        unknown: Why this is unknown; empty if it is known.
    """

    run: str | None = None
    reuses: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    changes: str = ""
    unknown: str = ""


class JobDescription(_DescriptionModel):
    """Description of a job.

    Attributes:
        name: Name of the job.
        run: Name of its run.
        plan: Which stages would be reused; None if storage is unavailable.
        base: Base of the classifier.
        data: Known facts about the images.
        stages: Training stages in order.
        notes: Unknown or unavailable facts, one sentence each.
    """

    name: str
    run: str
    plan: PlanDescription | None
    base: BaseDescription
    data: DataDescription
    stages: tuple[StageDescription, ...]
    notes: tuple[str, ...]
