"""`spec.transfer` and `spec.fineTune`: how the head, then the base, is trained."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from topwork.spec.feature_cache import CacheSetting, FeatureCache, views_are_seen
from topwork.spec.messages import shown
from topwork.spec.optimizer import Ema, LearningRate, Optimizer, Schedule
from topwork.spec.section import Meaning, Number, Part, Refusal, Whole, rule

__all__ = [
    "EarlyStopping",
    "Ema",
    "FeatureCache",
    "FineTune",
    "Loss",
    "Optimizer",
    "Schedule",
    "Transfer",
    "UnfreezeFrom",
    "UnfreezeLayers",
    "UnfreezeStep",
    "UnfreezeSteps",
]

BatchSize = Annotated[Whole, Field(ge=1, le=65536)]
Epochs = Annotated[Whole, Field(ge=1, le=10000)]
Layers = Annotated[Whole, Field(ge=1, le=10000)]
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=200), Meaning("the name of a layer of the base")]
LossName = Literal["auto", "binaryCrossentropy", "categoricalCrossentropy", "sparseCategoricalCrossentropy", "focal"]


class Loss(Part):
    """The loss that training minimises."""

    name: LossName = Field(default="auto", description="auto: binary cross-entropy for two classes, else categorical.")
    label_smoothing: Number = Field(default=0.0, ge=0.0, lt=1.0, description="Share of the label spread over classes.")
    gamma: Number = Field(default=2.0, ge=0.0, le=10.0, description="focal: how much easy examples count less.")


class EarlyStopping(Part):
    """End a stage when the monitored value no longer gets better, and keep the best weights."""

    monitor: Literal["loss", "accuracy", "auc"] = Field(default="loss", description="Validation value that is watched.")
    patience: Whole = Field(default=3, ge=1, le=1000, description="Epochs without a gain that are borne.")
    min_delta: Number = Field(default=0.0, ge=0.0, le=1000.0, description="Least change that counts as a gain.")


def _loss_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<mapping>" if isinstance(value, dict | Loss) else None


class Transfer(Part):
    """Stage 1: the base frozen (or all of it trained, for a base from scratch), the head new."""

    train: Literal["head", "all"] = Field(default="head", description="What is trained: the head alone, or all.")
    epochs: Epochs = Field(default=10, description="Epochs at most.")
    batch_size: BatchSize = Field(default=64, description="Images a step over all replicas (global batch).")
    optimizer: Optimizer = Field(default=Optimizer(), description="Optimizer of the head.")
    loss: Annotated[
        Annotated[LossName, Tag("<name>")] | Annotated[Loss, Tag("<mapping>")], Discriminator(_loss_kind)
    ] = Field(default="auto", description="Loss by name, or with its parameters.")
    class_weights: Literal["none", "balanced"] = Field(
        default="none", description="balanced: each class counts alike, however many images it has."
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="When to end before the last epoch.")
    feature_cache: CacheSetting = Field(
        default="auto",
        description="Compute what the frozen base gives once instead of once an epoch: auto, on, off or {use, views}.",
    )

    @property
    def cache(self) -> FeatureCache:
        """The feature cache with all its settings."""
        return FeatureCache.of(self.feature_cache)


class UnfreezeLayers(Part):
    """The last layers of the base, counted from the top."""

    layers: Layers = Field(description="Layers with weights, counted from the top of the base.")


class UnfreezeFrom(Part):
    """A layer of the base and all above it."""

    from_layer: LayerName = Field(alias="from", description="Name of the lowest layer that is unfrozen.")


class UnfreezeStep(Part):
    """One step of gradual unfreezing."""

    layers: Layers = Field(
        description="Layers with weights that are unfrozen in this step, counted from the top; those of the steps "
        "before are among them."
    )
    epochs: Epochs = Field(description="Epochs of this step.")
    learning_rate: LearningRate = Field(description="Learning rate of this step.")


class UnfreezeSteps(Part):
    """Gradual unfreezing, from the top of the base downwards."""

    steps: tuple[UnfreezeStep, ...] = Field(min_length=1, max_length=100, description="The steps, in order.")


UNFREEZE_KINDS: dict[str, type[Part]] = {"layers": UnfreezeLayers, "from": UnfreezeFrom, "steps": UnfreezeSteps}


def _unfreeze_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<all>"
    for key, part in UNFREEZE_KINDS.items():
        if isinstance(value, part) or (isinstance(value, dict) and (key in value or f"{key}_layer" in value)):
            return f"<{key}>"
    return None


class FineTune(Part):
    """Stage 2: part or all of the base unfrozen, trained on at a very low learning rate."""

    epochs: Epochs | None = Field(default=None, description="Epochs at most; with unfreeze.steps each has its own.")
    unfreeze: Annotated[
        Annotated[Literal["all"], Tag("<all>")]
        | Annotated[UnfreezeLayers, Tag("<layers>")]
        | Annotated[UnfreezeFrom, Tag("<from>")]
        | Annotated[UnfreezeSteps, Tag("<steps>")],
        Discriminator(_unfreeze_kind),
        Meaning("all, {layers: n}, {from: name} or {steps: […]}"),
    ] = Field(default="all", description="What is unfrozen: all, {layers: n}, {from: name} or {steps: […]}.")
    batch_size: BatchSize | None = Field(default=None, description="Images a step over all replicas; as in transfer.")
    optimizer: Optimizer = Field(default=Optimizer(learning_rate=1e-5), description="Optimizer of the whole.")
    class_weights: Literal["none", "balanced"] | None = Field(default=None, description="As in transfer.")
    early_stopping: EarlyStopping | None = Field(default=None, description="When to end before the last epoch.")
    feature_cache: CacheSetting = Field(
        default="auto",
        description="Compute what the layers below the unfrozen ones give once instead of once an epoch, as in "
        "transfer.",
    )

    @property
    def cache(self) -> FeatureCache:
        """The feature cache with all its settings."""
        return FeatureCache.of(self.feature_cache)

    @property
    def most_epochs(self) -> int:
        """Epochs at most, over all steps."""
        if isinstance(self.unfreeze, UnfreezeSteps):
            return sum(step.epochs for step in self.unfreeze.steps)
        return self.epochs or 0


@rule(Loss)
def smoothing_needs_soft_labels(loss: Loss) -> Iterator[Refusal]:
    """Sparse cross-entropy takes the number of a class, of which no share can be spread."""
    if loss.label_smoothing and loss.name == "sparseCategoricalCrossentropy":
        yield Refusal(
            "labelSmoothing",
            f"{shown(loss.label_smoothing)} can't be had with sparseCategoricalCrossentropy, whose labels are class "
            "numbers. Name categoricalCrossentropy, which learns the same otherwise.",
        )


@rule(Loss)
def gamma_belongs_to_focal_loss(loss: Loss) -> Iterator[Refusal]:
    """Another loss would ignore it without a word."""
    if loss.gamma != Loss.model_fields["gamma"].default and loss.name != "focal":
        yield Refusal("gamma", f"{shown(loss.gamma)} goes with focal, not with {loss.name}. Take it out or name focal.")


@rule(Transfer)
def cache_needs_a_frozen_base(transfer: Transfer) -> Iterator[Refusal]:
    """The features of a base that learns are others after each step."""
    if transfer.cache.use == "on" and transfer.train == "all":
        yield Refusal(
            "featureCache", "on needs a frozen base, but train is all. Set featureCache: auto, or train: head."
        )


@rule(FineTune)
def cache_needs_frozen_layers(fine_tune: FineTune) -> Iterator[Refusal]:
    """With all of the base unfrozen there's nothing below what is trained."""
    if fine_tune.cache.use == "on" and fine_tune.unfreeze == "all":
        yield Refusal(
            "featureCache",
            "on needs layers that stay frozen, but unfreeze is all. Set featureCache: auto, or unfreeze the top alone.",
        )


@rule(Transfer)
def transfer_sees_all_views(transfer: Transfer) -> Iterator[Refusal]:
    """Each epoch takes one view of an image."""
    yield from views_are_seen(transfer.cache, transfer.epochs)


@rule(FineTune)
def fine_tune_sees_all_views(fine_tune: FineTune) -> Iterator[Refusal]:
    """As in transfer."""
    yield from views_are_seen(fine_tune.cache, fine_tune.most_epochs)


@rule(Transfer)
def transfer_schedule_fits(transfer: Transfer) -> Iterator[Refusal]:
    """A warmup that outlasts the stage never reaches the learning rate, a step after its end never comes."""
    yield from _schedule_fits(transfer.optimizer.schedule, transfer.epochs)


@rule(FineTune)
def fine_tune_schedule_fits(fine_tune: FineTune) -> Iterator[Refusal]:
    """As in transfer; with steps, the schedule begins anew in each."""
    if isinstance(fine_tune.unfreeze, UnfreezeSteps):
        yield from _schedule_fits(
            fine_tune.optimizer.schedule, min(step.epochs for step in fine_tune.unfreeze.steps), " of the shortest step"
        )
    elif fine_tune.epochs is not None:
        yield from _schedule_fits(fine_tune.optimizer.schedule, fine_tune.epochs)


@rule(FineTune)
def epochs_are_said_once(fine_tune: FineTune) -> Iterator[Refusal]:
    """Steps have epochs of their own; without steps the stage needs its number."""
    by_steps = isinstance(fine_tune.unfreeze, UnfreezeSteps)
    if by_steps and fine_tune.epochs is not None:
        yield Refusal("epochs", f"{fine_tune.epochs} stands beside unfreeze.steps, which have their own. Take it out.")
    if not by_steps and fine_tune.epochs is None:
        yield Refusal("epochs", "missing. Epochs at most of this stage.")


@rule(FineTune)
def own_optimizer_names_its_rate(fine_tune: FineTune) -> Iterator[Refusal]:
    """The default of an optimizer is made for a new head; for pretrained weights it is far too high."""
    optimizer = fine_tune.optimizer
    if "learning_rate" not in optimizer.model_fields_set and not isinstance(fine_tune.unfreeze, UnfreezeSteps):
        yield Refusal(
            "optimizer.learningRate",
            f"missing. An optimizer of its own would begin at {shown(optimizer.learning_rate)}, which suits a new head "
            "and washes out pretrained weights. Try 1e-05.",
        )


@rule(FineTune)
def steps_go_down(fine_tune: FineTune) -> Iterator[Refusal]:
    """Each step unfreezes more than the one before; what has been unfrozen stays so."""
    if isinstance(fine_tune.unfreeze, UnfreezeSteps):
        steps = fine_tune.unfreeze.steps
        for index, (one, other) in enumerate(pairwise(steps)):
            if other.layers <= one.layers:
                yield Refusal(
                    f"unfreeze.steps.{index + 1}.layers",
                    f"{other.layers} is not above {one.layers} of the step before. Layers are counted from the top "
                    "each time, so every step names more.",
                )


def _schedule_fits(schedule: Schedule, epochs: int, of: str = "") -> Iterator[Refusal]:
    if schedule.warmup_epochs >= epochs:
        yield Refusal(
            "optimizer.schedule.warmupEpochs",
            f"{shown(schedule.warmup_epochs)} is not below epochs {epochs}{of}: it would end before the learning rate "
            "is reached. Try a tenth of the epochs.",
        )
    if schedule.at_epochs and schedule.at_epochs[-1] >= epochs:
        yield Refusal(
            f"optimizer.schedule.atEpochs.{len(schedule.at_epochs) - 1}",
            f"{schedule.at_epochs[-1]} is not before the last epoch{of}, {epochs}: the step would never come. "
            "Take it out.",
        )
