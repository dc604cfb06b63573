"""A training stage from start, or from where it was left, to its `done.json`."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import keras

from topwork.clients.s3.storage import entry_of
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import LocalDataset, fetch
from topwork.model.augmentation import augment
from topwork.model.classifier import in_precision
from topwork.model.freezing import parameter_groups, unfreeze
from topwork.model.partition import Halves, halves, multiplications
from topwork.registry.stage_results import (
    Classifier,
    Parameters,
    Row,
    model_key,
    models_prefix,
    read_done,
    repeat,
    stage_prefix,
    write_done,
)
from topwork.spec import TransferJob
from topwork.training.checkpoints import Checkpoints
from topwork.training.feature_cache.features import FeatureJob, computed, features_prefix
from topwork.training.feature_cache.policy import keeps_features
from topwork.training.input_stalls import remedies
from topwork.training.plan import Plan
from topwork.training.preflight import check_data
from topwork.training.strategy import check_replicas, policy, strategy
from topwork.training.trainer import Training
from topwork.workspace import Workspace


def train(
    plan: Plan,
    start: Callable[[], keras.Model],
    earlier: list[Row],
    job: TransferJob,
    dataset: StoredDataset,
    workspace: Workspace,
) -> Classifier:
    """Train a stage, or find that it is done.

    Args:
        plan: What the stage does.
        start: Builds the classifier that the stage begins with, in float32; called in the scope of the strategy.
        earlier: History of the stages before.
        job: The job.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The classifier with the best weights, stored.

    Raises:
        SpecError: If the settings don't go with the replicas or splits.
        DataError: If the data or the base can't be used.
        Stopped: If asked to stop; the checkpoint is stored.
    """
    distribution = strategy(workspace.replicas)
    replicas = distribution.num_replicas_in_sync
    for phase in plan.phases:
        check_replicas(replicas, plan.batch_size, phase.optimizer)
    data = fetch(dataset, job, workspace)
    check_data(job, plan, data)
    workspace.metrics.replicas(replicas)
    keras.utils.clear_session()
    keras.utils.set_random_seed(plan.seed)
    with distribution.scope():
        model, cut = _in_best_precision(start(), plan, job)
    prefix = stage_prefix(job.run, plan.stage)
    with workspace.stop.held(), Checkpoints(workspace, prefix, job.spec.compute.checkpoint_minutes) as checkpoints:
        training = _training(plan, model, cut, data, job, workspace, checkpoints)
        training.run()
        classifier = _store(training, model, plan, earlier, job, data.class_names, workspace)
        checkpoints.clear()
        workspace.storage.delete(stored.key for stored in workspace.storage.list(f"{features_prefix(job, plan)}/"))
    return classifier


def _in_best_precision(model: keras.Model, plan: Plan, job: TransferJob) -> tuple[keras.Model, Halves | None]:
    """Copy the model into the number format that suits what runs in each step, and cut it below all that is trained."""
    cut = _cut(model, plan)
    kept, _ = keeps_features(plan.caching, plan.epochs, cut)
    work = multiplications(cut.upper if cut and kept else model)
    best = in_precision(model, policy(job.spec.compute.precision, work))
    return best, cut if best is model else _cut(best, plan)


def _cut(model: keras.Model, plan: Plan) -> Halves | None:
    unfreeze(model.get_layer("base"), plan.phases[-1].unfrozen, batch_norm=plan.batch_norm)
    return halves(model)


def _training(
    plan: Plan,
    model: keras.Model,
    cut: Halves | None,
    data: LocalDataset,
    job: TransferJob,
    workspace: Workspace,
    checkpoints: Checkpoints,
) -> Training:
    """Set up the training on images or, where the frozen layers are to run once only, on their features."""
    change = augment(job.spec.augmentation)
    kept, reason = keeps_features(plan.caching, plan.epochs, cut)
    workspace.progress.note("feature cache", stage=plan.stage, used=kept, reason=reason)
    if cut and kept and (features := computed(FeatureJob(job, plan, data, cut, change, workspace))):
        plan = _with_remedies(plan, job, on_features=True)
        return Training(plan, model, cut.upper, features, workspace, checkpoints, None)
    with model.distribute_strategy.scope():
        whole = cut.joined() if cut else model
    plan = _with_remedies(plan, job, on_features=False)
    return Training(plan, model, whole, data, workspace, checkpoints, change)


def _with_remedies(plan: Plan, job: TransferJob, *, on_features: bool) -> Plan:
    told = remedies(job.spec, plan.stage, plan.phases[-1].unfrozen, on_features=on_features)
    return replace(plan, remedies=told)


def _store(
    training: Training,
    model: keras.Model,
    plan: Plan,
    earlier: list[Row],
    job: TransferJob,
    class_names: tuple[str, ...],
    workspace: Workspace,
) -> Classifier:
    """Upload the model, then mark the stage as done."""
    # Another process of this run was faster: its model stays as its mark says.
    if (standing := read_done(workspace.storage, job.run, plan.stage)) is not None:
        return standing
    # A model that was never compiled: no optimizer or loss of the training goes into the file.
    plain = in_precision(keras.Model(model.inputs[0], model.outputs[0], name="classifier"), "float32")
    path = workspace.scratch / f"{plan.stage}.keras"
    plain.save(path)
    file = entry_of(path)
    key = model_key(job.run, plan.stage, file)
    workspace.storage.upload(path, key)
    path.unlink()
    groups = parameter_groups(model)
    course = training.course
    standing = write_done(
        workspace.storage,
        job.run,
        Classifier(
            stage=plan.stage,
            key=key,
            file=file,
            class_names=class_names,
            image_size=job.spec.dataset.image_size,
            history=[*earlier, *course.rows],
            best_epoch=course.best_epoch,
            parameters=Parameters(
                trainable=sum(group.trainable for group in groups), frozen=sum(group.frozen for group in groups)
            ),
            started=course.started,
            finished=datetime.now(UTC),
            seconds=sum(float(row["seconds"]) for row in course.rows),
        ),
    )
    # Models of processes that ended before they could mark theirs, or were slower.
    stored = workspace.storage.list(models_prefix(job.run, plan.stage))
    workspace.storage.delete(each.key for each in stored if each.key != standing.key)
    return standing


def found(classifier: Classifier, workspace: Workspace) -> Classifier:
    """Say that a stage is done already, and repeat what it measured, so that its results are still scraped."""
    workspace.progress.note(
        "already done", stage=classifier.stage, epochs=len(classifier.rows), best_epoch=classifier.best_epoch
    )
    repeat(classifier, workspace.metrics)
    return classifier
