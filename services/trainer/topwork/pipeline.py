"""The pipeline of a run on one screen: pull, audit, transfer, fine-tune, publish. Start reading here.

`topwork run` calls `run`. In a cluster the containers of the Job call `run_pull`, `run_transfer` and `run`, one after
the other; each skips the stages that are already complete in storage.
"""

import structlog

from topwork.audit.findings import AuditFindings
from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.storage_check import check_storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.disk_space import report_full_disk
from topwork.errors import UnavailableError
from topwork.registry.stage_results import ROOT, Classifier
from topwork.spec import TransferJob
from topwork.spec.yaml_output import dump_job
from topwork.stages.audit import audit
from topwork.stages.fine_tune import fine_tune
from topwork.stages.publish import Published, publish
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.strategy import get_strategy
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)


def run(job: TransferJob, workspace: Workspace) -> Published:
    """Run a job from its dataset to its published model.

    Every stage is idempotent: a completed stage is skipped, an interrupted one resumes from its newest checkpoint. It
    is always safe to call this again after the process was killed or stopped, or after a failure.

    Args:
        job: The job to run.
        workspace: Storage, metrics, progress and scratch directory of the run.

    Returns:
        The published version with its metrics.

    Raises:
        TopworkError: With the exit code that the cluster acts on; see `topwork.errors`.

    Example:
        `published = run(job, workspace)`
    """
    with report_full_disk(workspace.scratch):
        prepare_training(job, workspace)
        dataset = pull(job, workspace)
        audit(job, dataset, workspace)
        classifier = transfer(job, dataset, workspace)
        if job.spec.fine_tune:
            classifier = fine_tune(job, classifier, dataset, workspace)
        return publish(job, classifier, dataset, workspace)


def run_transfer(job: TransferJob, workspace: Workspace) -> Classifier:
    """Run a job up to its transferred classifier. Arguments and errors are those of `run`."""
    with report_full_disk(workspace.scratch):
        prepare_training(job, workspace)
        dataset = pull(job, workspace)
        audit(job, dataset, workspace)
        return transfer(job, dataset, workspace)


def run_audit(job: TransferJob, workspace: Workspace) -> AuditFindings | None:
    """Run a job up to the audit of its dataset, and train nothing."""
    with report_full_disk(workspace.scratch):
        check_operations(workspace)
        return audit(job, pull(job, workspace), workspace)


def run_pull(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Run a job up to its stored dataset. Another process may pull for the same run at the same time."""
    with report_full_disk(workspace.scratch):
        check_operations(workspace)
        store_spec(job, workspace)
        return pull(job, workspace)


def prepare_training(job: TransferJob, workspace: Workspace) -> None:
    """Prepare the process and the storage of a run for training. No other process may train the same run.

    Args:
        job: The job.
        workspace: Storage and number of replicas of the run.
    """
    # Replicas must be configured before pull initializes TensorFlow.
    get_strategy(workspace.replicas)
    check_operations(workspace)
    abort_incomplete_uploads(job, workspace)
    store_spec(job, workspace)


def check_operations(workspace: Workspace) -> None:
    """Check that storage supports all operations: one that it does not support must not fail the run after training.

    A server that fails or cannot be reached for the moment is left to the operations themselves, which are retried.

    Args:
        workspace: Storage of the run.

    Raises:
        SettingError: If the server does not support an operation.
        AccessError: If the credentials are rejected, or do not permit an operation.
    """
    try:
        check_storage(workspace.storage)
    except AccessError:
        raise
    except UnavailableError as error:
        log.warning("storage check was interrupted", reason=str(error))


def abort_incomplete_uploads(job: TransferJob, workspace: Workspace) -> None:
    """Abort uploads that killed processes left behind: all of this run, and all others after a day.

    Args:
        job: The job; no other process may train its run.
        workspace: Storage of the run.
    """
    uploads, run = workspace.storage.multipart_uploads, f"runs/{job.run}/"
    uploads.abort_incomplete(run, older_than_seconds=0)
    uploads.abort_incomplete(f"{ROOT}/", older_than_seconds=0, containing=f"/{run}")
    uploads.abort_incomplete()


def store_spec(job: TransferJob, workspace: Workspace) -> None:
    """Store the spec next to the results of the run, so that a run name can be traced back to its spec.

    Args:
        job: The job.
        workspace: Storage of the run.
    """
    workspace.storage.write(f"runs/{job.run}/spec.yaml", dump_job(job).encode(), content_type="application/yaml")
