"""The pipeline of a run on one screen: pull, audit, transfer, fine-tune, publish. Start reading here.

With `spec.dataset.splits.folds`, it trains and evaluates each fold first.

`topwork run` calls `run`. In a cluster the containers of the Job call `run_pull`, `run_transfer` and `run`, one after
the other; each skips the stages that are already complete in storage.

With `spec.compute.nodes`, every node runs this code. Node 0, the chief, does what must be done once; the others wait
for it in a collective operation of `workspace.nodes`, which fails if the chief fails.
"""

from dataclasses import replace

import structlog

from topwork.audit.findings import AuditFindings
from topwork.clients.s3.errors import AccessError
from topwork.clients.s3.storage_check import check_storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.disk_space import report_full_disk
from topwork.errors import UnavailableError
from topwork.registry.cross_validation import CrossValidation, fold_jobs
from topwork.registry.shared_features import delete_features_of_search
from topwork.registry.stage_results import ROOT, Classifier
from topwork.report.results import Results
from topwork.spec import TransferJob
from topwork.spec.yaml_output import dump_job
from topwork.stages.audit import audit
from topwork.stages.evaluate_folds import combine_folds, evaluate_fold
from topwork.stages.fine_tune import fine_tune
from topwork.stages.publish import Published, publish
from topwork.stages.pull import find_pulled_dataset, pull, wait_for_dataset
from topwork.stages.transfer import transfer
from topwork.stages.validate import Validated, validate
from topwork.training.distribution.strategy import get_strategy
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)


def run(job: TransferJob, workspace: Workspace) -> Published | Validated | CrossValidation | Classifier:
    """Run a job from its dataset to its published model, or to the metrics of validation or cross-validation.

    Every stage is idempotent: a completed stage is skipped, an interrupted one resumes from its newest checkpoint. It
    is always safe to call this again after the process was killed or stopped, or after a failure.

    Args:
        job: The job to run.
        workspace: Storage, metrics, progress and scratch directory of the run.

    Returns:
        The published version with its metrics. If the job does not publish, the metrics only, of cross-validation or
        on the validation split. On other nodes than the chief, the trained classifier.

    Raises:
        TopworkError: With the exit code that the cluster acts on; see `topwork.errors`.

    Example:
        `published = run(job, workspace)`
    """
    with report_full_disk(workspace.scratch):
        dataset = prepare_training(job, workspace)
        if not workspace.nodes.is_chief:
            return train_parts(job, dataset, workspace)
        if not job.spec.dataset.folds:
            classifier = train(job, dataset, workspace)
            if not job.spec.publishes:
                return validate(job, classifier, dataset, workspace)
            published = publish(job, classifier, dataset, workspace)
            delete_features_of_search(job, workspace.storage)
            return published
        validation, results = cross_validate(job, dataset, workspace)
        if not job.spec.publishes:
            return validation
        log.info("final model", folds=len(validation.folds))
        return publish(job, train(job, dataset, workspace), dataset, workspace, results)


def train_parts(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Run the training stages of every fold and of the final model, in the order in which the chief runs them.

    Returns:
        The classifier that was trained last.
    """
    folds = fold_jobs(job)
    parts = [*folds, job] if job.spec.publishes or not folds else folds
    return [train(part, dataset, workspace) for part in parts][-1]


def audit_parts(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> list[AuditFindings]:
    """Audit the dataset of a job, with the splits of each fold in cross-validation; empty if the audit is off."""
    findings = (audit(part, dataset, workspace) for part in fold_jobs(job) or [job])
    return [found for found in findings if found]


def cross_validate(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> tuple[CrossValidation, Results]:
    """Train and evaluate each fold as a run of its own, one after the other. Completed folds are skipped.

    Args:
        job: The job, whose spec has folds.
        dataset: The stored dataset.
        workspace: Storage, metrics, progress and scratch directory of the run.

    Returns:
        The metrics of all folds, and the results that describe a final model.

    Raises:
        GateError: If the mean of a metric does not meet a gate.
    """
    results = {}
    for fold in fold_jobs(job):
        log.info("fold", number=fold.spec.dataset.fold, of=job.spec.dataset.folds, run=fold.run)
        results[fold.run] = evaluate_fold(fold, train(fold, dataset, workspace), dataset, workspace)
    return combine_folds(job, results, dataset, workspace)


def train(job: TransferJob, dataset: StoredDataset, workspace: Workspace) -> Classifier:
    """Run the training stages of a job, or of one of its folds."""
    classifier = transfer(job, dataset, workspace)
    return fine_tune(job, classifier, dataset, workspace) if job.spec.fine_tune else classifier


def run_transfer(job: TransferJob, workspace: Workspace) -> Classifier:
    """Run a job up to its transferred classifier, which is that of the last fold in cross-validation.

    Arguments and errors are those of `run`.
    """
    with report_full_disk(workspace.scratch):
        dataset = prepare_training(job, workspace)
        return [transfer(part, dataset, workspace) for part in fold_jobs(job) or [job]][-1]


def run_audit(job: TransferJob, workspace: Workspace) -> list[AuditFindings]:
    """Run a job up to the audit of its dataset, and train nothing.

    Returns:
        The findings; those of each fold in cross-validation, and none if the audit is off.
    """
    with report_full_disk(workspace.scratch):
        check_operations(workspace)
        return audit_parts(job, pull(job, workspace), workspace)


def run_pull(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Run a job up to its stored dataset. Another process may pull for the same run at the same time.

    The chief pulls; the other nodes, which are not connected yet, wait for the dataset.
    """
    with report_full_disk(workspace.scratch):
        if not workspace.nodes.is_chief:
            return wait_for_dataset(job, workspace)
        check_operations(workspace)
        store_spec(job, workspace)
        return pull(job, workspace)


def prepare_training(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Prepare the process, the storage of a run and its dataset for training. No other run trains the same job.

    Args:
        job: The job.
        workspace: Storage, nodes and number of replicas of the run.

    Returns:
        The dataset, which is the same on all nodes.
    """
    nodes = workspace.nodes
    # Replicas must be configured before pull initializes TensorFlow.
    get_strategy(workspace.replicas, nodes)
    if not nodes.is_chief:
        dataset = _find_dataset_of_chief(job, workspace)
        nodes.broadcast(None)
        return dataset
    check_operations(workspace)
    abort_incomplete_uploads(job, workspace)
    store_spec(job, workspace)
    dataset = pull(job, workspace)
    nodes.broadcast(dataset.prefix)
    audit_parts(job, dataset, workspace)
    nodes.broadcast(None)
    return dataset


def _find_dataset_of_chief(job: TransferJob, workspace: Workspace) -> StoredDataset:
    prefix = workspace.nodes.broadcast(None)
    dataset = find_pulled_dataset(job, replace(workspace, dataset=prefix))
    if dataset is None:
        raise UnavailableError(f"The dataset {workspace.storage.uri_of(prefix)} disappeared. Start the same job again.")
    return dataset


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
    uploads = workspace.storage.multipart_uploads
    for run in (job.run, *(fold.run for fold in fold_jobs(job))):
        uploads.abort_incomplete(f"runs/{run}/", older_than_seconds=0)
        uploads.abort_incomplete(f"{ROOT}/", older_than_seconds=0, containing=f"/runs/{run}/")
    uploads.abort_incomplete()


def store_spec(job: TransferJob, workspace: Workspace) -> None:
    """Store the spec next to the results of the run, so that a run name can be traced back to its spec.

    Args:
        job: The job.
        workspace: Storage of the run.
    """
    workspace.storage.write(f"runs/{job.run}/spec.yaml", dump_job(job).encode(), content_type="application/yaml")
