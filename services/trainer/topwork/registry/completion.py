"""Whether the training of a run is complete, so that only its evaluation or publishing may be left."""

from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.errors import UnavailableError
from topwork.registry.cross_validation import fold_jobs
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import Classifier, TrainingStage, read_stage_result, republish_metrics
from topwork.spec import TransferJob
from topwork.workspace import Workspace


def is_training_complete(job: TransferJob, stage: TrainingStage, dataset: StoredDataset, storage: Storage) -> bool:
    """Return whether the results of all training stages up to one are stored, without changing anything.

    Args:
        job: The job, whose folds train like runs of their own.
        stage: `transfer` for the part of the training before fine-tuning, `fine-tune` for all of it.
        dataset: The stored dataset.
        storage: Storage of the job.

    Raises:
        UnavailableError: If storage cannot be reached.
    """
    return all(
        read_stage_result(storage, name, key) is not None
        for _, name, key in training_stage_keys(job, stage, dataset, storage)
    )


def read_last_result(job: TransferJob, stage: TrainingStage, dataset: StoredDataset, storage: Storage) -> Classifier:
    """Return the classifier of the last training stage of a job whose training is complete.

    Arguments and errors are those of `is_training_complete`.
    """
    _, name, key = training_stage_keys(job, stage, dataset, storage)[-1]
    classifier = read_stage_result(storage, name, key)
    if classifier is None:
        raise UnavailableError(f"The result of {name} was deleted while the run used it. Start the same job again.")
    return classifier


def restore_metrics(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> None:
    """Set the metrics of this process to those of the training stages of a complete run, which others have trained.

    Args:
        job: The job.
        dataset: The stored dataset.
        workspace: Storage and metrics.
    """
    for _, stage, key in training_stage_keys(job, "fine-tune", dataset, workspace.storage):
        if classifier := read_stage_result(workspace.storage, stage, key):
            republish_metrics(classifier, workspace.metrics)


def training_stage_keys(
    job: TransferJob, stage: TrainingStage, dataset: StoredDataset, storage: Storage
) -> list[tuple[str, TrainingStage, str]]:
    """List the training stages of a job and its folds, in the order of the pipeline.

    Arguments and errors are those of `is_training_complete`.

    Returns:
        Name of the run, stage, and key of its result.
    """
    return [
        (part.run, name, key)
        for part in _parts(job, stage)
        for name, key in stage_keys(part, dataset.metadata.fingerprint, storage, dataset.inputs).training_stages.items()
        if stage == "fine-tune" or name == "transfer"
    ]


def _parts(job: TransferJob, stage: TrainingStage) -> list[TransferJob]:
    """List the folds of a job, and the job itself unless it trains only its folds up to this stage."""
    folds = fold_jobs(job)
    return [*folds, job] if not folds or (stage == "fine-tune" and job.spec.publishes) else folds
