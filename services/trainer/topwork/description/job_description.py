"""The description of a job: what its stages train, as people and programs read it."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from topwork.spec.training import EarlyStopping


class _Facts(BaseModel):
    """Frozen; keys of JSON are camelCase."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)


class LayerCount(_Facts):
    """Parameters of the layers that belong together."""

    layers: str
    trainable: int
    frozen: int


class Rate(_Facts):
    """The learning rate of a phase.

    Attributes:
        peak: What the spec gives.
        schedule: Kind of course.
        first: Rate of the first step; None where the steps aren't known, and the rate moves.
        last: Rate of the last step.
    """

    peak: float
    schedule: str
    first: float | None
    last: float | None


class PhaseFacts(_Facts):
    """Epochs with the same layers trained by the same optimizer.

    Attributes:
        trained: What is trained, in words.
        epochs: Epochs at most.
        steps: Steps at most; None where the images aren't known.
        optimizer: Its settings, as in the spec.
        learning_rate: Its course.
        layers: Each layer group of the base, from input to output, and the head; empty where the base isn't there.
        trainable: Parameters that are trained; None where the base isn't there.
        frozen: Parameters that stay.
    """

    trained: str
    epochs: int
    steps: int | None
    optimizer: dict[str, Any]
    learning_rate: Rate
    layers: tuple[LayerCount, ...]
    trainable: int | None
    frozen: int | None


class CacheFacts(_Facts):
    """Whether features of the frozen layers are computed once instead of once an epoch, as far as room allows."""

    used: bool
    views: int
    reason: str


class StageFacts(_Facts):
    """A training stage.

    Attributes:
        stage: Its name.
        batch_size: Images a step over all replicas.
        steps_per_epoch: Whole batches in the training images; None where these aren't known.
        epochs: Epochs at most.
        steps: Steps at most.
        loss: Name of Keras' loss; the spec's word where the number of classes isn't known.
        balanced: Whether each class counts alike.
        early_stopping: When a phase ends before its last epoch.
        feature_cache: None where the base isn't there.
        phases: What is trained, in order.
    """

    stage: str
    batch_size: int
    steps_per_epoch: int | None
    epochs: int
    steps: int | None
    loss: str
    balanced: bool
    early_stopping: EarlyStopping | None
    feature_cache: CacheFacts | None
    phases: tuple[PhaseFacts, ...]


class BaseFacts(_Facts):
    """What the classifier stands on.

    Attributes:
        kind: application, saved or cnn.
        name: Name of the application, or address of the saved model.
        weights: Where its weights come from, in words.
        input_size: Height and width in pixels.
        scaling: How raw pixels are scaled, in words.
        parameters: Its parameters; None where it isn't there.
    """

    kind: str
    name: str
    weights: str
    input_size: tuple[int, int]
    scaling: str
    parameters: int | None


class DataFacts(_Facts):
    """What is known of the images; see `KnownData`."""

    classes: int | None
    images: dict[str, int | None]
    dataset: str | None


class Description(_Facts):
    """A job without its training.

    Attributes:
        name: Name of the job.
        run: Name of its run.
        base: What the classifier stands on.
        data: What is known of the images.
        stages: The training stages, in order.
        notes: What isn't known or can't be had, each in a sentence.
    """

    name: str
    run: str
    base: BaseFacts
    data: DataFacts
    stages: tuple[StageFacts, ...]
    notes: tuple[str, ...]
