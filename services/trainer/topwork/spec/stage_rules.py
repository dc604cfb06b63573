"""Rules that check the training stages together with other sections of the spec. `topwork.spec` registers them."""

from collections.abc import Iterable, Iterator

from topwork.spec.job import JobSpec
from topwork.spec.messages import format_value
from topwork.spec.model import Augmentation
from topwork.spec.spec_model import Violation, rule
from topwork.spec.training import FeatureCache, Loss, check_steps, check_view_count


@rule(JobSpec)
def every_view_is_used(spec: JobSpec) -> Iterator[Violation]:
    """Each epoch uses one view of an image. With keepCheckpoint, later epochs may use the others."""
    if spec.compute.keep_checkpoint:
        return
    epochs = {"transfer": spec.transfer.epochs, "fineTune": spec.fine_tune.max_epochs if spec.fine_tune else 0}
    for stage, cache in _feature_caches(spec).items():
        yield from _in_stage(stage, check_view_count(cache, epochs[stage]))


@rule(JobSpec)
def every_step_of_the_learning_rate_happens(spec: JobSpec) -> Iterator[Violation]:
    """A step after the last epoch never happens, except if keepCheckpoint allows to train more epochs later."""
    if spec.compute.keep_checkpoint:
        return
    yield from _in_stage("transfer", check_steps(spec.transfer.optimizer.schedule, spec.transfer.epochs))
    if spec.fine_tune and spec.fine_tune.shortest_phase is not None:
        steps = check_steps(spec.fine_tune.optimizer.schedule, *spec.fine_tune.shortest_phase)
        yield from _in_stage("fineTune", steps)


@rule(JobSpec)
def feature_cache_excludes_mixing(spec: JobSpec) -> Iterator[Violation]:
    """MixUp and CutMix combine different images at each step, so their features cannot be computed in advance."""
    mixing = [
        key for key, alpha in (("mixUp", spec.augmentation.mix_up), ("cutMix", spec.augmentation.cut_mix)) if alpha
    ]
    for stage, cache in _feature_caches(spec).items():
        if mixing and cache.use == "on":
            yield Violation(
                f"{stage}.featureCache",
                f"on cannot be combined with augmentation.{mixing[0]}, which combines different images at each step. "
                f"Set featureCache: auto, or remove {mixing[0]}.",
            )


@rule(JobSpec)
def views_require_augmentation(spec: JobSpec) -> Iterator[Violation]:
    """Without augmentation, all views of an image are identical."""
    if spec.augmentation != Augmentation():
        return
    for stage, cache in _feature_caches(spec).items():
        if cache.views is not None and cache.views > 1:
            yield Violation(
                f"{stage}.featureCache.views",
                f"{cache.views} views of an image would be identical, because spec.augmentation is off. Remove views, "
                "or set spec.augmentation.",
            )


@rule(JobSpec)
def mixed_labels_require_a_categorical_loss(spec: JobSpec) -> Iterator[Violation]:
    """MixUp and CutMix create labels with two classes; sparse cross-entropy supports only one."""
    loss = spec.transfer.loss
    name = loss.name if isinstance(loss, Loss) else loss
    for key, alpha in (("mixUp", spec.augmentation.mix_up), ("cutMix", spec.augmentation.cut_mix)):
        if alpha and name == "sparseCategoricalCrossentropy":
            yield Violation(
                f"augmentation.{key}",
                f"{format_value(alpha)} mixes two labels, but {name} expects a single class index. Set "
                f"spec.transfer.loss to categoricalCrossentropy or auto, or set {key} to 0.",
            )


def _in_stage(stage: str, violations: Iterable[Violation]) -> Iterator[Violation]:
    return (Violation(f"{stage}.{path}", message) for path, message in violations)


def _feature_caches(spec: JobSpec) -> dict[str, FeatureCache]:
    caches = {"transfer": spec.transfer.cache}
    return caches | ({"fineTune": spec.fine_tune.cache} if spec.fine_tune else {})
