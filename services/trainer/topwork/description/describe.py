"""Describes what each stage of a job would train, using the planning code of the stages, without training."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import keras

from topwork.description.job_description import (
    BaseDescription,
    CacheDescription,
    DataDescription,
    JobDescription,
    LayerGroupCount,
    LearningRate,
    PhaseDescription,
    PlanDescription,
    StageDescription,
)
from topwork.description.known_dataset import KnownDataset
from topwork.model.backbones import find_backbone
from topwork.model.classifier import build_classifier
from topwork.model.conversion.variant import Normalization
from topwork.model.freezing import UnfreezeSetting, count_parameters, set_trainable
from topwork.model.input_scaling import find_input_scaling
from topwork.model.partition import partition_model
from topwork.spec import TransferJob
from topwork.spec.fine_tune import UnfreezeFrom, UnfreezeLayers
from topwork.spec.job import JobSpec
from topwork.spec.model import Base
from topwork.spec.optimizer import Optimizer
from topwork.stages.fine_tune import plan_fine_tune
from topwork.stages.transfer import plan_transfer
from topwork.training.feature_cache.policy import should_cache_features
from topwork.training.losses import make_loss
from topwork.training.optimizers import make_learning_rate
from topwork.training.plan import TrainingPhase, TrainingPlan

# Number of classes used to count the parameters of the head if the real number is unknown.
ASSUMED_CLASSES = 2
# Input scalings of applications and of saved models.
_SCALINGS = {
    "tf": "to -1..1",
    "torch": "to mean 0 and standard deviation 1 of ImageNet",
    "caffe": "BGR minus the ImageNet mean",
    "inside": "inside the base",
    "zeroToOne": "to 0..1",
    "minusOneToOne": "to -1..1",
    "none": "none (pixels in 0..255)",
}


def describe(
    job: TransferJob,
    data: KnownDataset,
    file: Path | None,
    notes: tuple[str, ...] = (),
    plan: PlanDescription | None = None,
) -> JobDescription:
    """Describe a job.

    Args:
        job: The job.
        data: Known facts about its images.
        file: The saved model or the weights file that the base is built from; None if it is unavailable or the base
            needs none.
        notes: Additional notes for the user.
        plan: Which stages a run would reuse; None if unknown.

    Returns:
        The content of `topwork describe`.

    Raises:
        SpecError: If the base cannot be built for this image size.
        DataError: If the saved model is invalid, or the base does not have the layer to unfreeze.
    """
    spec = job.spec
    keras.utils.clear_session()
    with _without_values(spec.model.base):
        model = _build_model(spec, data.classes or ASSUMED_CLASSES, file)
        plans = [plan for plan in (plan_transfer(spec), plan_fine_tune(spec)) if plan]
        stages = tuple(_stage(plan, model, data) for plan in plans)
        base = _base(spec, model, file)
    keras.utils.clear_session()
    return JobDescription(
        name=job.metadata.name,
        run=(plan.run if plan else None) or job.run,
        plan=plan,
        base=base,
        data=DataDescription(classes=data.classes, images=data.images, dataset=data.dataset),
        stages=stages,
        notes=(*data.notes, *notes, *_notes(spec, data, stages, has_model=model is not None)),
    )


@contextmanager
def _without_values(base: Base) -> Iterator[None]:
    """Create variables without values, so that the largest model takes no memory. Saved models need their values."""
    if base.saved:
        yield
        return
    with keras.StatelessScope(initialize_variables=False):
        yield


def _build_model(spec: JobSpec, classes: int, file: Path | None) -> keras.Model | None:
    """Build the classifier as in training, but without pretrained weights of an application."""
    base = spec.model.base
    if base.saved:
        return build_classifier(spec.model, spec.dataset.image_size, classes, file) if file else None
    untrained = base.model_copy(update={"weights": "none"}) if base.application else base
    return build_classifier(spec.model.model_copy(update={"base": untrained}), spec.dataset.image_size, classes, None)


def _stage(plan: TrainingPlan, model: keras.Model | None, data: KnownDataset) -> StageDescription:
    images = data.images.get("train")
    per_epoch = None if images is None else images // plan.batch_size
    return StageDescription(
        stage=plan.stage,
        batch_size=plan.batch_size,
        steps_per_epoch=per_epoch,
        epochs=plan.epochs,
        steps=_multiply(plan.epochs, per_epoch),
        loss=_loss(plan, data.classes),
        balanced=plan.balance_classes,
        early_stopping=plan.early_stopping,
        feature_cache=_feature_cache(plan, model),
        phases=tuple(_phase(phase, plan, model, per_epoch) for phase in plan.phases),
    )


def _feature_cache(plan: TrainingPlan, model: keras.Model | None) -> CacheDescription | None:
    """Apply the policy of training. Only whether there is enough space for the features is unknown."""
    if model is None:
        return None
    set_trainable(model.get_layer("base"), plan.phases[-1].unfrozen, batch_norm=plan.train_batch_norm)
    used, reason = should_cache_features(plan.feature_cache, plan.epochs, partition_model(model))
    return CacheDescription(used=used, views=plan.feature_cache.views if used else 0, reason=reason)


def _phase(
    phase: TrainingPhase, plan: TrainingPlan, model: keras.Model | None, per_epoch: int | None
) -> PhaseDescription:
    groups = []
    if model is not None:
        set_trainable(model.get_layer("base"), phase.unfrozen, batch_norm=plan.train_batch_norm)
        groups = count_parameters(model)
    return PhaseDescription(
        trained=_describe_unfrozen(phase.unfrozen),
        epochs=phase.epochs,
        steps=_multiply(phase.epochs, per_epoch),
        optimizer=phase.optimizer.model_dump(mode="json", by_alias=True, exclude_none=True),
        learning_rate=_rate(phase.optimizer, phase.epochs, per_epoch),
        layers=tuple(
            LayerGroupCount(layers=group.name, trainable=group.trainable, frozen=group.frozen) for group in groups
        ),
        trainable=sum(group.trainable for group in groups) if groups else None,
        frozen=sum(group.frozen for group in groups) if groups else None,
    )


def _rate(settings: Optimizer, epochs: int, per_epoch: int | None) -> LearningRate:
    """Compute the learning rate of the first and last step with the Keras schedule."""
    peak, name = settings.learning_rate, settings.schedule.name
    if name == "constant":
        return LearningRate(peak=peak, schedule=name, first=peak, last=peak)
    if not per_epoch:
        return LearningRate(peak=peak, schedule=name, first=None, last=None)
    schedule = make_learning_rate(peak, settings.schedule, steps_per_epoch=per_epoch, epochs=epochs)
    return LearningRate(
        peak=peak, schedule=name, first=float(schedule(0)), last=float(schedule(epochs * per_epoch - 1))
    )


def _loss(plan: TrainingPlan, classes: int | None) -> str:
    if classes is None:
        return plan.loss if isinstance(plan.loss, str) else plan.loss.name
    return str(make_loss(plan.loss, classes).name)


def _describe_unfrozen(unfrozen: UnfreezeSetting) -> str:
    if isinstance(unfrozen, UnfreezeLayers):
        layers = f"the last {unfrozen.layers} layers" if unfrozen.layers > 1 else "the last layer"
        return f"the head and {layers} of the base"
    if isinstance(unfrozen, UnfreezeFrom):
        return f"the head and the base from {unfrozen.from_layer} on"
    return "the head and all of the base" if unfrozen == "all" else "the head"


def _base(spec: JobSpec, model: keras.Model | None, file: Path | None) -> BaseDescription:
    base = spec.model.base
    kind = "application" if base.application else "saved" if base.saved else "cnn"
    return BaseDescription(
        kind=kind,
        name=base.application or (base.saved.uri if base.saved else "CNN trained from scratch"),
        weights={"saved": "from the file", "cnn": "random"}.get(kind) or _weights(base),
        input_size=spec.dataset.image_size,
        image_fit=spec.dataset.image_fit,
        scaling=_scaling(base, model, file),
        parameters=None if model is None else model.get_layer("base").count_params(),
    )


def _weights(base: Base) -> str:
    return {"none": "random", "imagenet": "ImageNet"}.get(base.weights or "imagenet", str(base.weights))


def _scaling(base: Base, model: keras.Model | None, file: Path | None) -> str:
    if base.application:
        scaling = find_backbone(base.application).find_scaling(file)
        if isinstance(scaling, Normalization):
            return f"(pixels / 255 - mean) / deviation, {scaling.describe()}"
        # Without a file in storage or at hand, the weights may be converted ones.
        unsure = ", unless the weights were converted" if file is None and base.has_weights_file else ""
        return _SCALINGS[scaling] + unsure
    if base.saved is None:
        return _SCALINGS["zeroToOne"]
    if base.saved.scaling is not None:
        return _SCALINGS[base.saved.scaling]
    if model is None:
        return "inside the base, if any"
    found = find_input_scaling(model.get_layer("base"))
    return f"inside the base ({', '.join(found.layers[:3])})" if found.scales_pixels else "none (pixels in 0..255)"


def _notes(
    spec: JobSpec, data: KnownDataset, stages: tuple[StageDescription, ...], *, has_model: bool
) -> Iterator[str]:
    if spec.dataset.folds:
        final = ", and then a final model on all images" if spec.publishes else ""
        trained = f"fold {spec.dataset.fold} only" if spec.dataset.fold else "each of them"
        yield f"Images and steps are those of one of {spec.dataset.folds} folds. The job trains {trained}{final}."
    if data.classes is None and has_model:
        yield (
            f"The number of classes is unknown until the dataset is pulled; the head is shown for {ASSUMED_CLASSES}. "
            "Use --classes N."
        )
    if data.images.get("train") is None:
        yield "The numbers of training images and steps are unknown until the dataset is pulled. Use --images N."
    for stage in stages:
        if stage.steps_per_epoch == 0:
            yield (f"{stage.stage} has fewer training images than its batchSize {stage.batch_size}, so it will fail.")


def _multiply(epochs: int, per_epoch: int | None) -> int | None:
    return None if per_epoch is None else epochs * per_epoch
