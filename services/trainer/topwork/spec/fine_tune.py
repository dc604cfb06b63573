"""`spec.fineTune`: training of part or all of the base, in one phase or gradually."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Discriminator, Field, StrictInt, StringConstraints, Tag

from topwork.spec.messages import format_value
from topwork.spec.optimizer import LearningRate, Optimizer
from topwork.spec.spec_model import SpecModel, ValueDescription, Violation, rule
from topwork.spec.training import (
    BatchSize,
    CacheSetting,
    EarlyStopping,
    Epochs,
    FeatureCache,
    check_warmup,
)

LayerCount = Annotated[StrictInt, Field(ge=1, le=10000)]
Keep = Literal["best", "last"]
LayerName = Annotated[
    str, StringConstraints(min_length=1, max_length=200), ValueDescription("the name of a layer of the base")
]


class UnfreezeLayers(SpecModel):
    """Unfreezes the last layers of the base."""

    layers: LayerCount = Field(description="Number of layers with weights to unfreeze, counted from the top.")


class UnfreezeFrom(SpecModel):
    """Unfreezes a layer of the base and all layers above it."""

    from_layer: LayerName = Field(alias="from", description="Name of the lowest layer to unfreeze.")


class UnfreezeStep(SpecModel):
    """One step of gradual unfreezing."""

    layers: LayerCount = Field(
        description="Number of layers with weights to unfreeze, counted from the top. Includes the layers of earlier "
        "steps."
    )
    epochs: Epochs = Field(description="Maximum number of epochs of this step.")
    learning_rate: LearningRate = Field(description="Peak learning rate of this step.")


class UnfreezeSteps(SpecModel):
    """Gradual unfreezing, from the top of the base downward."""

    steps: tuple[UnfreezeStep, ...] = Field(min_length=1, max_length=100, description="Steps, in order.")


UNFREEZE_MODELS: dict[str, type[SpecModel]] = {"layers": UnfreezeLayers, "from": UnfreezeFrom, "steps": UnfreezeSteps}


def _unfreeze_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<all>"
    for key, model in UNFREEZE_MODELS.items():
        if isinstance(value, model) or (isinstance(value, dict) and (key in value or f"{key}_layer" in value)):
            return f"<{key}>"
    return None


class FineTune(SpecModel):
    """Stage 2: unfreezes part or all of the base and continues training at a very low learning rate."""

    epochs: Epochs | None = Field(
        default=None,
        description="Maximum number of epochs. Required unless unfreeze has steps, which set their own epochs.",
    )
    unfreeze: Annotated[
        Annotated[Literal["all"], Tag("<all>")]
        | Annotated[UnfreezeLayers, Tag("<layers>")]
        | Annotated[UnfreezeFrom, Tag("<from>")]
        | Annotated[UnfreezeSteps, Tag("<steps>")],
        Discriminator(_unfreeze_tag),
        ValueDescription("all, {layers: n}, {from: name} or {steps: […]}"),
    ] = Field(
        default="all",
        description="Layers of the base to unfreeze: all, {layers: n}, {from: name} or {steps: […]}. "
        "BatchNormalization layers stay frozen.",
    )
    batch_size: BatchSize | None = Field(
        default=None, description="Global batch size: images per step over all replicas. Unset: as in transfer."
    )
    optimizer: Optimizer = Field(
        default=Optimizer(learning_rate=1e-5),
        description="Optimizer of this stage. If you set it, also set its learningRate.",
    )
    class_weights: Literal["none", "balanced"] | None = Field(
        default=None, description="Weights of the classes in the loss. Unset: as in transfer."
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="When to stop before the last epoch. Unset: never."
    )
    keep: Keep = Field(
        default="best",
        description="Weights to keep. best: those of the epoch with the best monitored metric (earlyStopping.monitor, "
        "or else loss) on the validation split; if no epoch improves on the result of transfer, those of transfer. A "
        "lower loss with a lower accuracy than that of transfer is no improvement. last: those of the last epoch of "
        "fine-tuning. Without a validation split, best is the same as last.",
    )
    feature_cache: CacheSetting = Field(
        default="auto",
        description="Whether to compute the output of the layers that stay frozen once instead of in every epoch: "
        "auto, on, off, or {use, views}.",
    )

    @property
    def cache(self) -> FeatureCache:
        """The feature cache setting in its full form."""
        return FeatureCache.from_setting(self.feature_cache)

    @property
    def max_epochs(self) -> int:
        """Maximum number of epochs over all steps."""
        if isinstance(self.unfreeze, UnfreezeSteps):
            return sum(step.epochs for step in self.unfreeze.steps)
        return self.epochs or 0

    @property
    def shortest_phase(self) -> tuple[int, str] | None:
        """Epochs of the stage or of its shortest step, and its name in messages; None without a number of epochs."""
        if isinstance(self.unfreeze, UnfreezeSteps):
            return min(step.epochs for step in self.unfreeze.steps), " of the shortest step"
        return None if self.epochs is None else (self.epochs, "")


@rule(FineTune)
def feature_cache_requires_frozen_layers(fine_tune: FineTune) -> Iterator[Violation]:
    """If the whole base is unfrozen, there are no frozen layers whose output could be cached."""
    if fine_tune.cache.use == "on" and fine_tune.unfreeze == "all":
        yield Violation(
            "featureCache",
            "on requires layers that stay frozen, but unfreeze is all. Set featureCache: auto, or unfreeze only the "
            "top layers.",
        )


@rule(FineTune)
def warmup_fits_the_epochs(fine_tune: FineTune) -> Iterator[Violation]:
    """As in transfer. With steps, the schedule restarts in each step and must fit the shortest one."""
    if fine_tune.shortest_phase is not None:
        yield from check_warmup(fine_tune.optimizer.schedule, *fine_tune.shortest_phase)


@rule(FineTune)
def epochs_are_set_once(fine_tune: FineTune) -> Iterator[Violation]:
    """Steps have their own epochs. Without steps, the stage needs a number of epochs."""
    has_steps = isinstance(fine_tune.unfreeze, UnfreezeSteps)
    if has_steps and fine_tune.epochs is not None:
        yield Violation(
            "epochs",
            f"{fine_tune.epochs} cannot be combined with unfreeze.steps, which set their own epochs. Remove it.",
        )
    if not has_steps and fine_tune.epochs is None:
        yield Violation("epochs", "is required. Set the maximum number of epochs of this stage.")


@rule(FineTune)
def custom_optimizer_sets_its_learning_rate(fine_tune: FineTune) -> Iterator[Violation]:
    """The default learning rate of an optimizer suits a new head but is far too high for pretrained weights."""
    optimizer = fine_tune.optimizer
    if "learning_rate" not in optimizer.model_fields_set and not isinstance(fine_tune.unfreeze, UnfreezeSteps):
        yield Violation(
            "optimizer.learningRate",
            f"is required. The default of {format_value(optimizer.learning_rate)} suits a new head but destroys "
            "pretrained weights. Try 1e-05.",
        )


@rule(FineTune)
def steps_unfreeze_more_layers(fine_tune: FineTune) -> Iterator[Violation]:
    """Each step unfreezes more layers than the one before; unfrozen layers stay unfrozen."""
    if isinstance(fine_tune.unfreeze, UnfreezeSteps):
        steps = fine_tune.unfreeze.steps
        for index, (earlier, step) in enumerate(pairwise(steps)):
            if step.layers <= earlier.layers:
                yield Violation(
                    f"unfreeze.steps.{index + 1}.layers",
                    f"{step.layers} is not above {earlier.layers} of the previous step. Layers are always counted from "
                    "the top, so each step needs a higher number.",
                )
