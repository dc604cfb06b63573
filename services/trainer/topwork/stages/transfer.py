"""The transfer stage: trains a new head on the frozen base, or the whole model."""

from functools import cache, partial

import keras

from topwork.data.dataset_manifest import StoredDataset
from topwork.registry.stage_keys import architecture_key, stage_keys
from topwork.registry.stage_results import Classifier, find_completed_stage, write_reference
from topwork.report.export_preflight import check_exportable
from topwork.spec import TransferJob
from topwork.spec.job import JobSpec
from topwork.training.base_files import fetch_base_file
from topwork.training.feature_cache.policy import feature_cache_policy
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan
from topwork.training.recent_base import build_job_classifier
from topwork.training.trainer import train
from topwork.workspace import Workspace


def transfer(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Train a new head on the base. The base is frozen unless `spec.transfer.train` is all.

    A stage that this or another run has completed is skipped; an interrupted stage resumes from its newest checkpoint.

    Args:
        job: The job.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch directory.

    Returns:
        The stored classifier with the best weights.

    Raises:
        SpecError: If the base or the settings do not suit the data or the replicas.
        DataError: If the data or the base cannot be used.
        UnavailableError: If storage or a download failed.
        Stopped: If a stop was requested; the checkpoint is stored.

    Example:
        `classifier = transfer(job, pull(job, workspace), workspace)`
    """
    with workspace.metrics.track_stage("transfer"):
        keys = stage_keys(job, dataset.metadata.fingerprint, workspace.storage, dataset.inputs)
        key = keys.transfer
        if (completed := find_completed_stage(job.run, "transfer", key, workspace)) is not None:
            return completed
        fetch_file = cache(partial(fetch_base_file, job.spec.model.base, workspace))

        def build_model() -> keras.Model:
            return build_job_classifier(job, len(dataset.metadata.class_names), workspace, fetch_file)

        context = StageContext(job, plan_transfer(job.spec), key, workspace, keys.continuations["transfer"])
        if workspace.nodes.is_chief:
            names = dataset.metadata.class_names
            architecture = architecture_key(job, dataset, workspace.storage)
            check_exportable(
                job, build_model, names, workspace, architecture=architecture, attempt_prefix=context.prefix
            )
        classifier = train(context, dataset, build_model)
        if workspace.nodes.is_chief:
            write_reference(workspace.storage, job.run, "transfer", key)
        return classifier


def plan_transfer(spec: JobSpec) -> TrainingPlan:
    """Derive the plan of the stage from the spec.

    Args:
        spec: The job's `spec`.

    Returns:
        The plan, with one phase.
    """
    settings = spec.transfer
    trains_all = settings.train == "all"
    return TrainingPlan(
        stage="transfer",
        phases=(TrainingPhase("all" if trains_all else "none", settings.epochs, settings.optimizer),),
        batch_size=settings.batch_size,
        loss=settings.loss,
        balance_classes=settings.class_weights == "balanced",
        early_stopping=settings.early_stopping,
        seed=spec.seed,
        feature_cache=feature_cache_policy(
            settings.cache, settings.epochs, spec.augmentation, all_trained=trains_all, shared=not spec.publish.enabled
        ),
        # A new base must learn its statistics; those of a pretrained base are kept.
        train_batch_norm=not spec.model.base.is_pretrained,
    )
