"""The followers of one job: what `spec.tracking` asks for, from the start of training to the outcome of the run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import structlog

from topwork.cancellation import StopInterrupt
from topwork.clients.s3.storage import Storage
from topwork.errors import DataError, GateError, Stopped, TopworkError, limit_message
from topwork.progress import StageProgress
from topwork.redaction import redact
from topwork.registry.cross_validation import fold_jobs
from topwork.search.jobs import template_job
from topwork.spec import TransferJob
from topwork.spec.search import TransferSearch
from topwork.tracking.background import BackgroundSender, Service
from topwork.tracking.event_files import EventFiles
from topwork.tracking.mlflow_runs import MlflowRuns, MlflowSearch
from topwork.tracking.mlflow_values import experiment_of
from topwork.tracking.run_record import Outcome, RunRecord, read_outcome, read_stages
from topwork.workspace import Workspace

log = structlog.get_logger(__name__)

CLOSE_SECONDS = 30.0
"""How long a finished run waits for its followers."""
STOP_SECONDS = 2.0
"""How long a stopped run waits for its followers: SIGKILL follows soon."""


def tracking_services(job: TransferJob, storage: Storage) -> list[Service]:
    """Return the services that `spec.tracking` names.

    Args:
        job: The job.
        storage: Storage of its run.
    """
    tracking = job.spec.tracking
    services: list[Service] = [EventFiles(storage)] if tracking.tensorboard else []
    if tracking.mlflow:
        services.append(MlflowRuns(tracking.mlflow.uri, experiment_of(job), storage))
    return services


def read_records(job: TransferJob, storage: Storage) -> list[RunRecord]:
    """Read what storage has of a run and of its folds.

    Args:
        job: The job of the run.
        storage: Its storage.

    Returns:
        The record of each fold that has started, and that of the run.

    Raises:
        DataError: If a result was not stored by topwork.
        UnavailableError: If storage cannot be reached.
    """
    records = [
        RunRecord(part, read_stages(storage, part.run), read_outcome(storage, part), "" if part is job else job.run)
        for part in (*fold_jobs(job), job)
    ]
    return [record for record in records if record.stages or record.job is job]


@contextmanager
def track_run(job: TransferJob, workspace: Workspace, *, is_last_stage: bool = True) -> Iterator[Workspace]:
    """Let the services of `spec.tracking` follow the block, which runs a job.

    Args:
        job: The job.
        workspace: Its workspace.
        is_last_stage: Whether the run is complete after the block. Otherwise, another process continues it.

    Yields:
        The workspace with the followers. Only the chief has any.

    Example:
        with track_run(job, workspace) as tracked:
            pipeline.run(job, tracked)
    """
    if not workspace.nodes.is_chief or not (services := tracking_services(job, workspace.storage)):
        yield workspace
        return
    tracking = RunTracking(job, workspace.storage, services)
    try:
        yield replace(workspace, followers=tracking)
    except BaseException as error:
        tracking.fail(error)
        raise
    if is_last_stage:
        tracking.finish()
    else:
        tracking.pause()


@contextmanager
def track_search(search: TransferSearch, storage: Storage) -> Iterator[None]:
    """Let MLflow show that the block, which runs a search, ended without a winner. A winner reports its own end.

    Args:
        search: The search.
        storage: Its storage.
    """
    try:
        yield
    except DataError as error:
        job = template_job(search)
        if mlflow := job.spec.tracking.mlflow:
            sender = BackgroundSender(MlflowSearch(mlflow.uri, experiment_of(job), storage))
            sender.submit(RunRecord(job, outcome=Outcome("FAILED", error=_describe(error))))
            if not sender.close(CLOSE_SECONDS):
                log.warning("tracking incomplete", service=MlflowSearch.name)
        raise


class RunTracking:
    """Follows a job and its folds. Services that cannot be reached get everything later."""

    def __init__(self, job: TransferJob, storage: Storage, services: list[Service]) -> None:
        """Announce the run.

        Args:
            job: The job.
            storage: Storage of its run.
            services: The services that follow it.
        """
        self._job, self._storage = job, storage
        self._senders = {service.name: BackgroundSender(service) for service in services}
        self._records = {job.run: RunRecord(job, is_running=True)}
        self._submit(job.run)

    def report(self, job: TransferJob, progress: StageProgress) -> None:
        """Report the epochs of a stage; see `topwork.progress.Followers`."""
        parent = "" if job.run == self._job.run else self._job.run
        record = self._records.get(job.run) or RunRecord(job, parent=parent, is_running=True)
        stages = {**record.stages, progress.stage: progress}
        self._records[job.run] = RunRecord(job, stages, parent=parent, is_running=True)
        self._submit(job.run)

    def finish(self) -> None:
        """Report that the run is complete, with its results from storage."""
        self._end(None)

    def fail(self, error: BaseException) -> None:
        """Report that the run ended with an error.

        Args:
            error: The error. A stopped run can be resumed.
        """
        self._end(error)

    def pause(self) -> None:
        """End without an outcome: another process runs the next stage."""
        self._close(CLOSE_SECONDS)

    def _end(self, error: BaseException | None) -> None:
        is_stopped = isinstance(error, Stopped | StopInterrupt | KeyboardInterrupt)
        if not is_stopped:
            self._read_results(error)
        text = _describe(error) if error else ""
        for record in self._records.values():
            outcome = record.outcome
            if error and (outcome is None or record.job.run == self._job.run):
                metrics = outcome.metrics if outcome and isinstance(error, GateError) else {}
                outcome = Outcome("KILLED" if is_stopped else "FAILED", metrics, error="" if is_stopped else text)
            self._records[record.job.run] = RunRecord(record.job, record.stages, outcome, record.parent)
            self._submit(record.job.run)
        self._close(STOP_SECONDS if is_stopped else CLOSE_SECONDS)

    def _read_results(self, error: BaseException | None) -> None:
        """Add what is in storage: stages that another process or run has completed, and the evaluation."""
        try:
            for record in read_records(self._job, self._storage):
                reported = self._records.get(record.job.run)
                stages = {**(reported.stages if reported else {}), **record.stages}
                self._records[record.job.run] = RunRecord(record.job, stages, record.outcome, record.parent)
        except TopworkError as failure:
            if error is None:
                log.warning("results not tracked", reason=str(failure), hint=self._hint)

    def _submit(self, run: str) -> None:
        for sender in self._senders.values():
            sender.submit(self._records[run])

    def _close(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for name, sender in self._senders.items():
            if not sender.close(max(0.0, deadline - time.monotonic())):
                log.warning("tracking incomplete", service=name, hint=self._hint)

    @property
    def _hint(self) -> str:
        return f"topwork track sync {self._storage.uri} {self._job.run}"


def _describe(error: BaseException) -> str:
    return limit_message(redact(str(error) or type(error).__name__))
