"""Decides whether a stage caches the features of its frozen layers, for how many views of an image, and why."""

from dataclasses import dataclass

from topwork.model.partition import Partition
from topwork.spec.model import Augmentation
from topwork.spec.training import FeatureCache

# Default number of views. Computing more of them costs as much as the epochs that they save.
MAX_DEFAULT_VIEWS = 4
# A training step costs about three forward passes: forward, and backward to inputs and to weights.
TRAINING_COST = 3
# A smaller speedup is not worth the memory or disk space.
MIN_SPEEDUP = 1.1


@dataclass(frozen=True)
class FeatureCachePolicy:
    """Feature cache settings of a stage, as derived from the spec.

    Attributes:
        views: Views of each training image to cache; 0 if features cannot be cached.
        shared: Whether other runs use the same features: trials of a search. Whether to cache them, and for how many
            views, then does not depend on the number of epochs.
        required: Whether the spec sets `on`, so that a lack of space is an error.
        disabled_reason: Why features cannot be cached; empty if they can.
    """

    views: int = 0
    shared: bool = False
    required: bool = False
    disabled_reason: str = ""


def feature_cache_policy(
    setting: FeatureCache, epochs: int, augmentation: Augmentation, *, all_trained: bool, shared: bool = False
) -> FeatureCachePolicy:
    """Read from the spec whether a stage may cache features, and for how many views.

    Args:
        setting: The stage's `featureCache`.
        epochs: Maximum number of epochs of the stage.
        augmentation: Augmentation of the training images.
        all_trained: Whether the stage trains every layer of the base.
        shared: Whether other runs use the same features.

    Returns:
        The number of views, or why features cannot be cached.
    """
    if setting.use == "off":
        return FeatureCachePolicy(disabled_reason="featureCache is off")
    if all_trained:
        return FeatureCachePolicy(disabled_reason="all layers of the base are trained")
    if augmentation.mix_up or augmentation.cut_mix:
        return FeatureCachePolicy(disabled_reason="mixUp and cutMix mix different images at every step")
    limit = MAX_DEFAULT_VIEWS if shared else min(epochs, MAX_DEFAULT_VIEWS)
    default = 1 if augmentation == Augmentation() else limit
    return FeatureCachePolicy(views=setting.views or default, shared=shared, required=setting.use == "on")


def estimate_speedup(views: int, epochs: int, partition: Partition) -> float:
    """Estimate the ratio of computation without and with cached features, over all epochs.

    Args:
        views: Views of each training image that are computed once; 0 if another run has computed them.
        epochs: Maximum number of epochs of the stage.
        partition: Frozen and trainable part of the classifier.

    Returns:
        The ratio; below 1 if caching would compute more.
    """
    frozen, trainable = partition.multiplications
    training = TRAINING_COST * trainable * epochs
    return (frozen * epochs + training) / max(frozen * views + training, 1.0)


def should_cache_features(policy: FeatureCachePolicy, epochs: int, partition: Partition | None) -> tuple[bool, str]:
    """Decide whether a stage caches features, before free space is known.

    Args:
        policy: Feature cache settings of the stage.
        epochs: Maximum number of epochs of the stage.
        partition: Frozen and trainable part of the classifier; None if no layer with weights can be separated from
            the trained layers.

    Returns:
        Whether to cache features, and the reason.
    """
    if not policy.views:
        return False, policy.disabled_reason
    if partition is None:
        return False, "no frozen layers are below all trained layers"
    runs = "once" if policy.views == 1 else f"for {policy.views} views"
    if policy.shared:
        speedup = estimate_speedup(0, 1, partition)
        reason = (
            f"the frozen layers run {runs} for all runs that share them, about {speedup:.1f} times less computation"
        )
    else:
        speedup = estimate_speedup(policy.views, epochs, partition)
        reason = f"the frozen layers run {runs} instead of {epochs} times, about {speedup:.1f} times less computation"
    if policy.required:
        return True, f"featureCache is on: {reason}"
    return speedup >= MIN_SPEEDUP, reason
