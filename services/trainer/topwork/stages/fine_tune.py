"""The fine-tune stage: unfreezes part or all of the base, in one phase or gradually, at a low learning rate."""

import keras

from topwork.data.dataset_manifest import StoredDataset
from topwork.registry.stage_keys import architecture_key, stage_keys
from topwork.registry.stage_results import Classifier, find_completed_stage, write_reference
from topwork.report.export_preflight import check_exportable
from topwork.spec import TransferJob
from topwork.spec.fine_tune import FineTune, UnfreezeLayers, UnfreezeSteps
from topwork.spec.job import JobSpec
from topwork.training.feature_cache.policy import feature_cache_policy
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan
from topwork.training.trainer import train
from topwork.workspace import Workspace

# Gives this stage a different image order and different augmented views than transfer, which uses the job's seed.
_SEED_OFFSET = 1_000_003


def fine_tune(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Unfreeze layers of the base and continue training. Batch normalization of the base stays frozen.

    A stage that this or another run has completed is skipped; an interrupted stage resumes from its newest checkpoint.

    Args:
        job: The job; without `spec.fineTune` the stage returns its input.
        classifier: Result of the transfer stage.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch directory.

    Returns:
        The stored classifier with the weights that `spec.fineTune.keep` selects: if no epoch of this stage is better,
        those of transfer.

    Raises:
        SpecError: If the settings do not suit the replicas or splits.
        DataError: If the base does not have the layers to unfreeze.
        UnavailableError: If storage failed.
        Stopped: If a stop was requested; the checkpoint is stored.

    Example:
        `classifier = fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)`
    """
    with workspace.metrics.track_stage("fine-tune"):
        plan, keys = (
            plan_fine_tune(job.spec),
            stage_keys(job, dataset.metadata.fingerprint, workspace.storage, dataset.inputs),
        )
        key = keys.fine_tune
        if plan is None or key is None:
            return classifier
        if (completed := find_completed_stage(job.run, "fine-tune", key, workspace)) is not None:
            return completed
        context = StageContext(job, plan, key, workspace, keys.continuations["fine-tune"])

        def load_model() -> keras.Model:
            return _load(classifier, workspace)

        if workspace.nodes.is_chief:
            names = dataset.metadata.class_names
            architecture = architecture_key(job, dataset, workspace.storage)
            check_exportable(
                job, load_model, names, workspace, architecture=architecture, attempt_prefix=context.prefix
            )
        result = train(context, dataset, load_model, classifier)
        if workspace.nodes.is_chief:
            write_reference(workspace.storage, job.run, "fine-tune", key)
        return result


def plan_fine_tune(spec: JobSpec) -> TrainingPlan | None:
    """Derive the plan of the stage from the spec.

    Args:
        spec: The job's `spec`.

    Returns:
        The plan; None without `spec.fineTune`.
    """
    settings, transfer = spec.fine_tune, spec.transfer
    if settings is None:
        return None
    return TrainingPlan(
        stage="fine-tune",
        phases=_phases(settings, transfer.epochs),
        batch_size=settings.batch_size or transfer.batch_size,
        loss=transfer.loss,
        balance_classes=(settings.class_weights or transfer.class_weights) == "balanced",
        early_stopping=settings.early_stopping,
        keep=settings.keep,
        seed=(spec.seed + _SEED_OFFSET) % 2**31,
        feature_cache=feature_cache_policy(
            settings.cache,
            settings.max_epochs,
            spec.augmentation,
            all_trained=settings.unfreeze == "all",
            shared=not spec.publish.enabled,
        ),
    )


def _phases(settings: FineTune, default_epochs: int) -> tuple[TrainingPhase, ...]:
    unfreeze = settings.unfreeze
    if not isinstance(unfreeze, UnfreezeSteps):
        return (TrainingPhase(unfreeze, settings.epochs or default_epochs, settings.optimizer),)
    return tuple(
        TrainingPhase(
            UnfreezeLayers(layers=step.layers),
            step.epochs,
            settings.optimizer.model_copy(update={"learning_rate": step.learning_rate}),
        )
        for step in unfreeze.steps
    )


def _load(classifier: Classifier, workspace: Workspace) -> keras.Model:
    path = workspace.scratch / "transferred.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    model = keras.models.load_model(path, compile=False, safe_mode=True)
    path.unlink()
    return model
