"""`spec.transfer`: training of the head, with the loss, early stopping and feature cache settings of a stage."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, StrictFloat, StrictInt, Tag

from topwork.spec.messages import format_value
from topwork.spec.optimizer import Optimizer, Schedule
from topwork.spec.spec_model import SpecModel, Violation, rule

BatchSize = Annotated[StrictInt, Field(ge=1, le=65536)]
Epochs = Annotated[StrictInt, Field(ge=1, le=10000)]
LossName = Literal["auto", "binaryCrossentropy", "categoricalCrossentropy", "sparseCategoricalCrossentropy", "focal"]
CacheMode = Literal["auto", "on", "off"]


class Loss(SpecModel):
    """The loss function and its parameters."""

    name: LossName = Field(
        default="auto",
        description="Loss function. auto selects binary cross-entropy for two classes and categorical cross-entropy "
        "for more.",
    )
    label_smoothing: StrictFloat = Field(
        default=0.0, ge=0.0, lt=1.0, description="Fraction of each label that is spread evenly over all classes."
    )
    gamma: StrictFloat = Field(
        default=2.0,
        ge=0.0,
        le=10.0,
        description="With focal: focusing parameter. Higher values reduce the weight of easy examples.",
    )


class EarlyStopping(SpecModel):
    """Ends a stage when the monitored metric stops improving. The best weights are kept.

    In fine-tuning, the result of transfer counts as epoch 0.
    """

    monitor: Literal["loss", "accuracy", "auc"] = Field(
        default="loss",
        description="Validation metric to monitor. loss is that of spec.transfer.loss; accuracy and auc are defined as "
        "in the evaluation of the published model.",
    )
    patience: StrictInt = Field(
        default=3, ge=1, le=1000, description="Epochs without improvement before training stops."
    )
    min_delta: StrictFloat = Field(
        default=0.0, ge=0.0, le=1000.0, description="Minimum change of the metric that counts as an improvement."
    )


class FeatureCache(SpecModel):
    """Cache of the output of the frozen layers, which is then computed once instead of in every epoch."""

    use: CacheMode = Field(
        default="auto",
        description="Whether to cache features: auto caches them if that is estimated to be faster, and the log states "
        "the reason; on always caches; off never caches.",
    )
    views: Annotated[StrictInt, Field(ge=1, le=100)] | None = Field(
        default=None,
        description="Number of augmented views to cache per training image; epochs use them in turn. Unset: one per "
        "epoch, at most 4; for a trial of a search, 4.",
    )

    @classmethod
    def from_setting(cls, setting: "FeatureCache | CacheMode") -> "FeatureCache":
        """Expand the short form (`auto`, `on` or `off`) of `featureCache`; a full setting is returned unchanged."""
        return setting if isinstance(setting, FeatureCache) else cls(use=setting)


def _loss_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<mapping>" if isinstance(value, dict | Loss) else None


def _cache_tag(value: object) -> str | None:
    if isinstance(value, str):
        return "<name>"
    return "<mapping>" if isinstance(value, dict | FeatureCache) else None


CacheSetting = Annotated[
    Annotated[CacheMode, Tag("<name>")] | Annotated[FeatureCache, Tag("<mapping>")], Discriminator(_cache_tag)
]


class Transfer(SpecModel):
    """Stage 1: trains a new head on the frozen base, or the whole model with train: all."""

    train: Literal["head", "all"] = Field(
        default="head", description="What to train: head freezes the base, all also trains the base."
    )
    epochs: Epochs = Field(default=10, description="Maximum number of epochs.")
    batch_size: BatchSize = Field(default=64, description="Global batch size: images per step over all replicas.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Optimizer of this stage.")
    loss: Annotated[
        Annotated[LossName, Tag("<name>")] | Annotated[Loss, Tag("<mapping>")], Discriminator(_loss_tag)
    ] = Field(default="auto", description="Loss function, as a name or as a mapping with parameters.")
    class_weights: Literal["none", "balanced"] = Field(
        default="none",
        description="Weights of the classes in the loss. balanced gives each class the same total weight.",
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="When to stop before the last epoch. Unset: never."
    )
    feature_cache: CacheSetting = Field(
        default="auto",
        description="Whether to compute the output of the frozen base once instead of in every epoch: auto, on, off, "
        "or {use, views}.",
    )

    @property
    def cache(self) -> FeatureCache:
        """The feature cache setting in its full form."""
        return FeatureCache.from_setting(self.feature_cache)


@rule(Loss)
def label_smoothing_requires_one_hot_labels(loss: Loss) -> Iterator[Violation]:
    """Sparse cross-entropy uses class indices as labels, which cannot be smoothed."""
    if loss.label_smoothing and loss.name == "sparseCategoricalCrossentropy":
        yield Violation(
            "labelSmoothing",
            f"{format_value(loss.label_smoothing)} is not supported with sparseCategoricalCrossentropy, whose labels "
            "are class indices. Use categoricalCrossentropy, which is otherwise equivalent.",
        )


@rule(Loss)
def gamma_requires_focal_loss(loss: Loss) -> Iterator[Violation]:
    """Other loss functions would ignore gamma silently."""
    if loss.gamma != Loss.model_fields["gamma"].default and loss.name != "focal":
        yield Violation(
            "gamma", f"{format_value(loss.gamma)} applies only to focal, not to {loss.name}. Remove it or use focal."
        )


@rule(FeatureCache)
def views_require_a_cache(cache: FeatureCache) -> Iterator[Violation]:
    """Without a cache, every step applies new random augmentation, so there are no views."""
    if cache.use == "off" and cache.views is not None:
        yield Violation("views", f"{cache.views} requires a cache, but use is off. Remove it, or set use: auto.")


@rule(Transfer)
def feature_cache_requires_a_frozen_base(transfer: Transfer) -> Iterator[Violation]:
    """The features of a trained base change at every step."""
    if transfer.cache.use == "on" and transfer.train == "all":
        yield Violation(
            "featureCache", "on requires a frozen base, but train is all. Set featureCache: auto, or train: head."
        )


@rule(Transfer)
def warmup_fits_the_epochs(transfer: Transfer) -> Iterator[Violation]:
    """A warmup longer than the stage never reaches the peak."""
    yield from check_warmup(transfer.optimizer.schedule, transfer.epochs)


def check_view_count(cache: FeatureCache, epochs: int) -> Iterator[Violation]:
    """Reject more views than a stage has epochs, because each epoch uses one view of an image.

    Args:
        cache: The cache of the stage.
        epochs: Maximum number of epochs; 0 if unknown.

    Yields:
        At most one violation, relative to the stage.
    """
    if cache.views is not None and epochs and cache.views > epochs:
        yield Violation(
            "featureCache.views",
            f"{cache.views} is above epochs {epochs}: each epoch uses one view of an image, so some views would never "
            f"be used. Use at most {epochs}.",
        )


def check_warmup(schedule: Schedule, epochs: int, scope: str = "") -> Iterator[Violation]:
    """Reject a warmup that is longer than its stage.

    Args:
        schedule: The schedule.
        epochs: Maximum number of epochs.
        scope: Text after the number of epochs in messages, such as ` of the shortest step`; empty for a whole stage.

    Yields:
        At most one violation, relative to the stage.
    """
    if schedule.warmup_epochs >= epochs:
        yield Violation(
            "optimizer.schedule.warmupEpochs",
            f"{format_value(schedule.warmup_epochs)} is not below epochs {epochs}{scope}, so the warmup would never "
            "reach the learning rate. Try a tenth of the epochs.",
        )


def check_steps(schedule: Schedule, epochs: int, scope: str = "") -> Iterator[Violation]:
    """Reject a step of the learning rate after the last epoch. Arguments and results are those of `check_warmup`."""
    if schedule.at_epochs and schedule.at_epochs[-1] >= epochs:
        yield Violation(
            f"optimizer.schedule.atEpochs.{len(schedule.at_epochs) - 1}",
            f"{schedule.at_epochs[-1]} is not before the last epoch{scope}, {epochs}, so this step would never happen. "
            "Remove it.",
        )
