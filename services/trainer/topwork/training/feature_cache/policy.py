"""Whether the features of a stage's frozen part are kept, how many views of them, and why."""

from dataclasses import dataclass

from topwork.model.partition import Halves
from topwork.spec.feature_cache import FeatureCache
from topwork.spec.model import Augmentation

# Without `views` in the spec: more of them cost as much as the epochs that they save.
MOST_VIEWS = 4
# A training step costs about three times what the forward pass does: forward, and backward to inputs and weights.
TRAINING_COST = 3
# Less than this is not worth the room that the features take.
LEAST_GAIN = 1.1


@dataclass(frozen=True)
class Caching:
    """What the spec says about the feature cache of a stage.

    Attributes:
        views: Views of each training image that would be kept; 0 where none can be.
        asked: Whether the spec says on, so that what is in the way is an error.
        why_not: Why there are none; empty where there are.
    """

    views: int = 0
    asked: bool = False
    why_not: str = ""


def caching(setting: FeatureCache, epochs: int, augmentation: Augmentation, *, all_trained: bool) -> Caching:
    """Read the spec: may features of this stage be kept, and how many views?

    Args:
        setting: The stage's `featureCache`.
        epochs: Its epochs.
        augmentation: Changes of the training images.
        all_trained: Whether nothing of the base stays frozen.

    Returns:
        The number of views, or why there are none.
    """
    if setting.use == "off":
        return Caching(why_not="featureCache is off")
    if all_trained:
        return Caching(why_not="all of the base is trained")
    if augmentation.mix_up or augmentation.cut_mix:
        return Caching(why_not="mixUp and cutMix mix other images at each step")
    default = 1 if augmentation == Augmentation() else min(epochs, MOST_VIEWS)
    return Caching(views=setting.views or default, asked=setting.use == "on")


def gain(views: int, epochs: int, halves: Halves) -> float:
    """Estimate how many times less is computed with kept features, in all epochs together.

    Args:
        views: Views of each training image that are computed once.
        epochs: Epochs of the stage.
        halves: Both halves of the classifier.

    Returns:
        The ratio; below 1 where more would be computed.
    """
    lower, upper = halves.work
    trained = TRAINING_COST * upper * epochs
    return (lower * epochs + trained) / max(lower * views + trained, 1.0)


def keeps_features(caching: Caching, epochs: int, halves: Halves | None) -> tuple[bool, str]:
    """Decide whether the features of a stage are kept, as far as room doesn't matter.

    Args:
        caching: What the spec says.
        epochs: Epochs of the stage.
        halves: Both halves of the classifier; None where nothing with weights stays frozen below what is trained.

    Returns:
        Whether they are kept, and why or why not.
    """
    if not caching.views:
        return False, caching.why_not
    if halves is None:
        return False, "no frozen layers lie below all that is trained"
    times = gain(caching.views, epochs, halves)
    seen = "once" if caching.views == 1 else f"for {caching.views} views"
    words = f"the frozen layers run {seen} instead of {epochs} times, about {times:.1f} times less to compute"
    if caching.asked:
        return True, f"featureCache is on: {words}"
    return times >= LEAST_GAIN, words
