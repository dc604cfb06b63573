"""The run that a search selected: its weights are published, and not others that the same spec would give now."""

from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.errors import DataError
from topwork.registry.stage_keys import stage_keys
from topwork.registry.stage_results import read_reference
from topwork.spec import TransferJob


def require_same_training(job: TransferJob, selected_run: str, dataset: StoredDataset, storage: Storage) -> None:
    """Require that a job uses the weights of the selected run, and does not train others from other files.

    Args:
        job: The job that publishes.
        selected_run: Name of the run of the best trial.
        dataset: The stored dataset of the search.
        storage: The storage of the job.

    Raises:
        DataError: If the base or a list of the splits has changed since the selected run was trained.
    """
    keys = stage_keys(job, dataset.metadata.fingerprint, storage, dataset.inputs)
    *_, (stage, key) = keys.training_stages.items()
    trained = read_reference(storage, selected_run, stage)
    if trained and trained.key != key:
        raise DataError(
            f"The base or a list of the splits has changed since the best trial was trained ({selected_run}). Restore "
            "it, or change metadata.name to start a new search."
        )
