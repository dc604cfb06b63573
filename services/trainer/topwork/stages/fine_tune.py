"""Stage 2: part or all of the base unfrozen, at once or step by step from the top, at a very low learning rate."""

import keras

from topwork.data.dataset_manifest import StoredDataset
from topwork.registry.stage_results import Classifier, read_done
from topwork.spec import TransferJob
from topwork.spec.job import JobSpec
from topwork.spec.training import FineTune, UnfreezeLayers, UnfreezeSteps
from topwork.training.feature_cache.policy import caching
from topwork.training.plan import Phase, Plan
from topwork.training.stage import found, train
from topwork.workspace import Workspace

# Keeps the views and orders of this stage apart from those of transfer, which has the job's seed itself.
_SEED_OFFSET = 1_000_003


def fine_tune(job: TransferJob, classifier: Classifier, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Train on with the base unfrozen; its batch normalization stays as it is.

    Args:
        job: The job; it has `spec.fineTune`.
        classifier: What transfer made.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch.

    Returns:
        The classifier with the best weights of this stage, stored.

    Raises:
        SpecError: If the settings don't go with the replicas or splits.
        DataError: If the base has no layer that is to be unfrozen.
        UnavailableError: If storage failed.
        Stopped: If asked to stop; the checkpoint is stored.
    """
    with workspace.metrics.stage("fine-tune"):
        if (done := read_done(workspace.storage, job.run, "fine-tune")) is not None:
            return found(done, workspace)
        plan = fine_tune_plan(job.spec)
        if plan is None:
            return classifier
        return train(plan, lambda: _start(classifier, workspace), classifier.history, job, dataset, workspace)


def fine_tune_plan(spec: JobSpec) -> Plan | None:
    """Say what the stage does.

    Args:
        spec: The job's `spec`.

    Returns:
        Its phases and settings; None without `spec.fineTune`.
    """
    settings, first = spec.fine_tune, spec.transfer
    if settings is None:
        return None
    return Plan(
        stage="fine-tune",
        phases=_phases(settings, first.epochs),
        batch_size=settings.batch_size or first.batch_size,
        loss=first.loss,
        balanced=(settings.class_weights or first.class_weights) == "balanced",
        early_stopping=settings.early_stopping,
        seed=(spec.seed + _SEED_OFFSET) % 2**31,
        caching=caching(
            settings.cache, settings.most_epochs, spec.augmentation, all_trained=settings.unfreeze == "all"
        ),
    )


def _phases(settings: FineTune, default_epochs: int) -> tuple[Phase, ...]:
    what = settings.unfreeze
    if not isinstance(what, UnfreezeSteps):
        return (Phase(what, settings.epochs or default_epochs, settings.optimizer),)
    return tuple(
        Phase(
            UnfreezeLayers(layers=step.layers),
            step.epochs,
            settings.optimizer.model_copy(update={"learning_rate": step.learning_rate}),
        )
        for step in what.steps
    )


def _start(classifier: Classifier, workspace: Workspace) -> keras.Model:
    path = workspace.scratch / "transferred.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    model = keras.models.load_model(path, compile=False, safe_mode=True)
    path.unlink()
    return model
