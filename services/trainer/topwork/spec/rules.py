"""Rules that cross the parts of a job: what would only fail, or silently go wrong, once data and GPUs are there."""

from collections.abc import Iterator

from topwork.spec.applications import LEAST_SIDE
from topwork.spec.job import JobSpec
from topwork.spec.messages import shown
from topwork.spec.model import Augmentation
from topwork.spec.optimizer import Optimizer
from topwork.spec.section import Refusal, rule
from topwork.spec.training import FeatureCache, Loss, UnfreezeSteps


@rule(JobSpec)
def gpus_divide_the_batch(spec: JobSpec) -> Iterator[Refusal]:
    """Replicas get equal parts of a global batch; uneven ones crash in AddN (keras#19246)."""
    sizes = {"transfer": spec.transfer.batch_size, "fineTune": spec.fine_tune.batch_size if spec.fine_tune else None}
    gpus = spec.compute.gpus
    for stage, size in sizes.items():
        if size and gpus > 1 and size % gpus:
            fits = ([size // gpus * gpus] if size > gpus else []) + [(size // gpus + 1) * gpus]
            yield Refusal(
                f"{stage}.batchSize",
                f"{size} is not divisible by spec.compute.gpus {gpus}: each replica takes an equal part of the global "
                f"batch. Try {' or '.join(map(str, fits))}.",
            )


def _optimizers(spec: JobSpec) -> dict[str, Optimizer]:
    optimizers = {"transfer": spec.transfer.optimizer}
    return optimizers | ({"fineTune": spec.fine_tune.optimizer} if spec.fine_tune else {})


@rule(JobSpec)
def replicas_do_not_accumulate(spec: JobSpec) -> Iterator[Refusal]:
    """Keras crashes when it accumulates gradients under MirroredStrategy (keras#20582)."""
    for stage, optimizer in _optimizers(spec).items():
        if spec.compute.gpus > 1 and optimizer.gradient_accumulation_steps is not None:
            yield Refusal(
                f"{stage}.optimizer.gradientAccumulationSteps",
                f"{optimizer.gradient_accumulation_steps} can't be had with spec.compute.gpus {spec.compute.gpus}: "
                "Keras crashes when it accumulates gradients over several replicas (keras#20582). Take it out, or set "
                "gpus: 1.",
            )


@rule(JobSpec)
def replicas_do_not_clip_globally(spec: JobSpec) -> Iterator[Refusal]:
    """Under MirroredStrategy each replica clips its own gradients before they are summed: another result each count."""
    for stage, optimizer in _optimizers(spec).items():
        if spec.compute.gpus > 1 and optimizer.global_clipnorm is not None:
            yield Refusal(
                f"{stage}.optimizer.globalClipnorm",
                f"{shown(optimizer.global_clipnorm)} can't be had with spec.compute.gpus {spec.compute.gpus}: each "
                "replica would clip its own gradients before they are summed. Use clipvalue, or set gpus: 1.",
            )


@rule(JobSpec)
def fine_tuning_goes_gently(spec: JobSpec) -> Iterator[Refusal]:
    """Rates of two optimizers can't be compared, and a base that has learnt nothing has nothing to lose."""
    if not spec.fine_tune or not spec.model.base.is_pretrained:
        return
    head, whole = spec.transfer.optimizer, spec.fine_tune.optimizer
    if head.name != whole.name:
        return
    unfreeze = spec.fine_tune.unfreeze
    rates = {"optimizer.learningRate": whole.learning_rate}
    if isinstance(unfreeze, UnfreezeSteps):
        rates = {
            f"unfreeze.steps.{index}.learningRate": step.learning_rate for index, step in enumerate(unfreeze.steps)
        }
    for path, rate in rates.items():
        if rate > head.learning_rate:
            yield Refusal(
                f"fineTune.{path}",
                f"{shown(rate)} is above spec.transfer.optimizer.learningRate {shown(head.learning_rate)}: a larger "
                f"step washes out pretrained weights. Try a tenth of it, {shown(head.learning_rate / 10)}.",
            )


@rule(JobSpec)
def early_stopping_has_something_to_watch(spec: JobSpec) -> Iterator[Refusal]:
    """The training values nearly always get better; only held-back images tell when to stop."""
    stages = {"transfer": spec.transfer.early_stopping}
    if spec.fine_tune:
        stages["fineTune"] = spec.fine_tune.early_stopping
    for stage, early_stopping in stages.items():
        if early_stopping and not spec.dataset.splits.validates:
            yield Refusal(
                f"{stage}.earlyStopping",
                f"watches the validation {early_stopping.monitor}, but there is no validation split. Add "
                "spec.dataset.splits.validation, or take earlyStopping out.",
            )


@rule(JobSpec)
def images_are_large_enough(spec: JobSpec) -> Iterator[Refusal]:
    """Below some size nothing is left of an image after an application's pooling; Keras refuses to build it."""
    application = spec.model.base.application
    least = LEAST_SIDE[application] if application else 0
    for index, side in enumerate(spec.dataset.image_size):
        if side < least:
            yield Refusal(
                f"dataset.imageSize.{index}", f"{side} is too small for {application}: at least {least} pixels a side."
            )


@rule(JobSpec)
def cnn_is_trained(spec: JobSpec) -> Iterator[Refusal]:
    """A frozen base with random weights keeps the head from learning much, and a cnn has no others."""
    if spec.transfer.train == "head" and spec.model.base.cnn:
        yield Refusal(
            "transfer.train",
            "head would keep a base frozen that has learnt nothing: cnn starts from random weights. Set train: all.",
        )


@rule(JobSpec)
def mixtures_are_not_kept(spec: JobSpec) -> Iterator[Refusal]:
    """MixUp and CutMix mix other images at each step: what the base gives for them can't be computed ahead."""
    mixed = [
        key for key, alpha in (("mixUp", spec.augmentation.mix_up), ("cutMix", spec.augmentation.cut_mix)) if alpha
    ]
    for stage, cache in _caches(spec).items():
        if mixed and cache.use == "on":
            yield Refusal(
                f"{stage}.featureCache",
                f"on can't be had with augmentation.{mixed[0]}, which mixes other images at each step: features of "
                f"mixtures can't be kept. Set featureCache: auto, or take {mixed[0]} out.",
            )


@rule(JobSpec)
def views_differ(spec: JobSpec) -> Iterator[Refusal]:
    """Views of an image are made by augmentation."""
    if spec.augmentation != Augmentation():
        return
    for stage, cache in _caches(spec).items():
        if cache.views is not None and cache.views > 1:
            yield Refusal(
                f"{stage}.featureCache.views",
                f"{cache.views} views of an image would all be alike: spec.augmentation changes nothing. Take views "
                "out, or say in spec.augmentation what is to be changed.",
            )


def _caches(spec: JobSpec) -> dict[str, FeatureCache]:
    caches = {"transfer": spec.transfer.cache}
    return caches | ({"fineTune": spec.fine_tune.cache} if spec.fine_tune else {})


@rule(JobSpec)
def mixed_labels_need_a_soft_loss(spec: JobSpec) -> Iterator[Refusal]:
    """MixUp and CutMix make labels of two classes at once; sparse cross-entropy knows only one."""
    loss = spec.transfer.loss
    name = loss.name if isinstance(loss, Loss) else loss
    for key, alpha in (("mixUp", spec.augmentation.mix_up), ("cutMix", spec.augmentation.cut_mix)):
        if alpha and name == "sparseCategoricalCrossentropy":
            yield Refusal(
                f"augmentation.{key}",
                f"{shown(alpha)} mixes two labels, and {name} takes one class number. Name categoricalCrossentropy or "
                f"auto in spec.transfer.loss, or set {key} to 0.",
            )
