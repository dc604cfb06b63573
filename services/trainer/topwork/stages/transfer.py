"""Stage 1: the base frozen and a new head trained, or all of a new model."""

from pathlib import Path

import keras

from topwork.data.dataset_manifest import StoredDataset
from topwork.model.classifier import build
from topwork.registry.stage_results import Classifier, read_done
from topwork.spec import TransferJob
from topwork.spec.job import JobSpec
from topwork.training.base_files import base_file
from topwork.training.feature_cache.policy import caching
from topwork.training.plan import Phase, Plan
from topwork.training.stage import found, train
from topwork.workspace import Workspace


def transfer(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Put a new head on the base and train it; the base is frozen unless `spec.transfer.train` is all.

    Args:
        job: The job.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The classifier with the best weights, stored.

    Raises:
        SpecError: If the base or the settings don't go with the data or the replicas.
        DataError: If the data or the base can't be used.
        UnavailableError: If storage or a download failed.
        Stopped: If asked to stop; the checkpoint is stored.
    """
    with workspace.metrics.stage("transfer"):
        if (done := read_done(workspace.storage, job.run, "transfer")) is not None:
            return found(done, workspace)
        file = base_file(job.spec.model.base, workspace)
        return train(transfer_plan(job.spec), lambda: _start(job, dataset, file), [], job, dataset, workspace)


def transfer_plan(spec: JobSpec) -> Plan:
    """Say what the stage does.

    Args:
        spec: The job's `spec`.

    Returns:
        Its phases and settings.
    """
    settings = spec.transfer
    return Plan(
        stage="transfer",
        phases=(Phase("all" if settings.train == "all" else "none", settings.epochs, settings.optimizer),),
        batch_size=settings.batch_size,
        loss=settings.loss,
        balanced=settings.class_weights == "balanced",
        early_stopping=settings.early_stopping,
        seed=spec.seed,
        caching=caching(settings.cache, settings.epochs, spec.augmentation, all_trained=settings.train == "all"),
        # A new base must learn its statistics; a trained one has some worth keeping.
        batch_norm=not spec.model.base.is_pretrained,
    )


def _start(job: TransferJob, dataset: StoredDataset, file: Path | None) -> keras.Model:
    settings = job.spec
    return build(settings.model, settings.dataset.image_size, len(dataset.facts.class_names), file)
