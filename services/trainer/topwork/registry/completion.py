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
    keys = {
        part.run: stage_keys(part, dataset.metadata.fingerprint, storage, dataset.inputs) for part in _parts(job, stage)
    }
    return all(
        read_stage_result(storage, name, keys[part.run].training_stages[name]) is not None
        for part, name in _training_stages(job, stage)
    )


def read_last_result(job: TransferJob, stage: TrainingStage, dataset: StoredDataset, storage: Storage) -> Classifier:
    """Return the classifier of the last training stage of a job whose training is complete.

    Arguments and errors are those of `is_training_complete`.
    """
    part, name = _training_stages(job, stage)[-1]
    keys = stage_keys(part, dataset.metadata.fingerprint, storage, dataset.inputs)
    classifier = read_stage_result(storage, name, keys.training_stages[name])
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
    for part in _parts(job, "fine-tune"):
        keys = stage_keys(part, dataset.metadata.fingerprint, workspace.storage, dataset.inputs)
        for stage, key in keys.training_stages.items():
            if classifier := read_stage_result(workspace.storage, stage, key):
                republish_metrics(classifier, workspace.metrics)


def _training_stages(job: TransferJob, stage: TrainingStage) -> list[tuple[TransferJob, TrainingStage]]:
    """List the training stages of each part of a job, in the order of the pipeline."""
    stages: list[TrainingStage] = ["transfer"]
    if stage == "fine-tune" and job.spec.fine_tune:
        stages.append("fine-tune")
    return [(part, name) for part in _parts(job, stage) for name in stages]


def _parts(job: TransferJob, stage: TrainingStage) -> list[TransferJob]:
    """List the folds of a job, and the job itself unless it trains only its folds up to this stage."""
    folds = fold_jobs(job)
    return [*folds, job] if not folds or (stage == "fine-tune" and job.spec.publishes) else folds
