"""What a run stores besides the results of its stages, and how it is deleted, so that it starts over."""

from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.registry.cross_validation import fold_jobs
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import (
    TRAINING_STAGES,
    continued_prefix,
    read_reference,
    result_prefix,
)
from topwork.spec import TransferJob


def delete_results(job: TransferJob, dataset: StoredDataset | None, storage: Storage) -> None:
    """Delete the results of a run. Published versions and datasets stay.

    Results of its training stages are deleted even if other runs use them: those train the stage again when they need
    it. Checkpoints of other runs that are training such a stage now stay. Checkpoints of shorter stages with the same
    settings are not found any more: the run starts over, too.

    Args:
        job: The job of the run; no process may work on it.
        dataset: Its dataset; None if it has not been pulled.
        storage: Storage of the job.
    """
    for part in (*fold_jobs(job), job):
        _delete_results(part, dataset, storage)


def _delete_results(job: TransferJob, dataset: StoredDataset | None, storage: Storage) -> None:
    prefixes = set()
    for stage in TRAINING_STAGES:
        if reference := read_reference(storage, job.run, stage):
            prefixes.add(result_prefix(stage, reference.key))
    if dataset:
        keys = stage_keys(job, dataset.metadata.fingerprint, storage, dataset.inputs)
        prefixes |= {result_prefix(stage, key) for stage, key in keys.training_stages.items()}
        for stage, key in keys.continuations.items():
            storage.delete([stored.key for stored in storage.list(continued_prefix(stage, key))])
    for prefix in sorted(prefixes):
        # Without `done.json`, readers ignore the rest.
        storage.delete([f"{prefix}/done.json"])
        attempts, own = f"{prefix}/runs/", f"{prefix}/runs/{job.run}/"
        found = [stored.key for stored in storage.list(f"{prefix}/")]
        storage.delete(key for key in found if key.startswith(own) or not key.startswith(attempts))
    storage.delete(stored.key for stored in list(storage.list(f"runs/{job.run}/")))


def validation_key(run: str) -> str:
    """Return the storage key of the metrics of a run that publishes nothing."""
    return f"runs/{run}/validation.json"
