"""Checking the source of a job before it is submitted: the dataset that its pods will use, and the name of its run."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.errors import SettingError, TopworkError, UnavailableError
from topwork.spec import TransferJob

if TYPE_CHECKING:
    from topwork.workspace import Workspace

UNVERSIONED = "the server of the archive reports neither ETag nor Last-Modified; set spec.dataset.source.archive.sha256"


@dataclass(frozen=True)
class CheckedSource:
    """The dataset that a job uses now.

    Attributes:
        run: Name of the run.
        changes: How the source differs from the dataset used before; empty if it does not or if there is none.
        dataset: Key prefix of the dataset; empty if it has to be pulled or is unknown.
        unchecked: Why the source could not be checked; empty if it was, or if it cannot change.
    """

    run: str
    changes: str = ""
    dataset: str = ""
    unchecked: str = ""


def check_source(job: TransferJob, *, pinned: bool) -> CheckedSource:
    """Find the dataset that a job uses now, without reading images and without the training libraries.

    Args:
        job: The job.
        pinned: Whether to keep the dataset that was used before, even if the source has changed.

    Returns:
        The dataset. If storage is not configured here or cannot be reached, the run is named by the spec alone.

    Raises:
        DataError: If the source or a list of the splits is invalid, or `pinned` and no dataset of this source is
            stored.
        SettingError: If `pinned` and no storage is configured here, or it rejects the credentials.
        UnavailableError: If `pinned` and storage cannot be reached.
    """
    base, dataset = job.spec.model.base, job.spec.dataset
    has_stored_base = (base.saved.uri if base.saved else base.weights or "").startswith("s3://")
    # The versions of TFDS datasets do not change.
    if dataset.source.tfds and not has_stored_base and dataset.split_settings.pin_test is None:
        return CheckedSource(job.run)
    # The image of the controller, which `helm test` runs, does not contain boto3.
    from topwork.cli.output.progress import NoProgress
    from topwork.cli.runtime.storage import open_optional_storage
    from topwork.clients.prometheus.metrics import Metrics
    from topwork.workspace import Workspace

    problem: TopworkError = SettingError("no storage is configured here")
    try:
        with (
            open_optional_storage(job.spec.storage) as storage,
            tempfile.TemporaryDirectory(prefix="topwork-") as scratch,
        ):
            if storage:
                return _check(job, Workspace(storage, Metrics(), NoProgress(), Path(scratch)), pinned=pinned)
    except (SettingError, UnavailableError) as error:
        problem = error
    if pinned:
        kind = UnavailableError if isinstance(problem, UnavailableError) else SettingError
        raise kind(f"--pinned needs the storage of the job, to find its previous dataset: {problem}")
    return CheckedSource(job.run, unchecked=str(problem))


def _check(job: TransferJob, workspace: "Workspace", *, pinned: bool) -> CheckedSource:
    from topwork.registry.datasets import select_dataset
    from topwork.registry.stage_keys import cluster_run_name, read_file_versions

    storage = workspace.storage
    selected = select_dataset(job, workspace, pinned=pinned, download=False)
    if selected:
        run = cluster_run_name(job, selected.fingerprint, storage)
        return CheckedSource(run, selected.changes, selected.stored.prefix if selected.stored else "")
    # A Job that is complete would hide another file of the base or another list.
    run = cluster_run_name(job, "", storage) if read_file_versions(job, storage) else job.run
    return CheckedSource(run, unchecked="" if job.spec.dataset.source.tfds else UNVERSIONED)
