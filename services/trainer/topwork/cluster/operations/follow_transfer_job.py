"""Following a TransferJob until its run is finished, across suspensions and changes of its spec."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import NotFoundError
from topwork.cluster.operations.follow import ConnectionStatus, RunFollower, RunGoneError
from topwork.cluster.operations.run_watcher import FollowTimings
from topwork.cluster.operations.transfer_jobs import require_transfer_job, watch_transfer_job
from topwork.cluster.status.objects import is_job_finished
from topwork.cluster.status.run_status import RunStatus
from topwork.cluster.status.transfer_job_run import (
    is_final,
    is_processed,
    read_transfer_job_run,
    read_transfer_job_status,
)
from topwork.errors import Stopped, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


class TransferJobFollower:
    """Follows a TransferJob: its own status while it has no Job, otherwise that of the Job.

    Args:
        cluster: The cluster.
        name: Name of the TransferJob.
        timings: Intervals and timeouts.
    """

    def __init__(self, cluster: "Cluster", name: str, timings: FollowTimings | None = None) -> None:
        self._cluster, self._name, self._timings = cluster, name, timings or FollowTimings()
        self._previous: RunStatus | None = None
        self._last: KubernetesObject | None = None

    def statuses(self) -> Iterator[RunStatus | ConnectionStatus]:
        """Yield the status of the current run whenever it changes; the last one is final.

        A run whose TransferJob is deleted ends as canceled.

        Yields:
            Statuses of the run, and of the connection when the API server stops responding or responds again.

        Raises:
            NotFoundError: If the TransferJob does not exist.
            SettingError: If the API server rejects a request.
            UnavailableError: If the API server does not respond for too long.
        """
        outage_start: float | None = None
        while True:
            try:
                for status in self._watch():
                    if outage_start is not None:
                        outage_start = None
                        yield ConnectionStatus(None)
                    yield status
                    if isinstance(status, RunStatus) and status.is_finished:
                        return
            except UnavailableError as error:
                if outage_start is None:
                    outage_start = time.monotonic()
                    yield ConnectionStatus(str(error))
                if time.monotonic() - outage_start > self._timings.outage_seconds:
                    raise
                self._previous = None
                time.sleep(self._timings.retry_seconds)

    def _watch(self) -> Iterator[RunStatus | ConnectionStatus]:
        """Yield changed statuses without end, until the API server does not respond."""
        try:
            for obj in watch_transfer_job(self._cluster, self._name):
                self._last = obj
                yield from self._job_statuses(obj)
                status = read_transfer_job_run(obj)
                if status != self._previous:
                    self._previous = status
                    yield status
        except NotFoundError:
            if self._last is None:
                raise
            error = f"transferjob/{self._name} was deleted"
            last = read_transfer_job_run(self._last)
            yield replace(last, phase="cancelled", exit_code=Stopped.exit_code, error=error, reason=None)

    def _job_statuses(self, obj: KubernetesObject) -> Iterator[RunStatus | ConnectionStatus]:
        """Yield the statuses of the Job of the current run, until it is finished or deleted; nothing without a Job."""
        run = read_transfer_job_status(obj).run
        job = self._cluster.get("Job", run) if run else None
        is_ending = job is not None and is_final(obj) and not is_job_finished(job)
        if run is None or job is None or is_ending or not is_processed(obj):
            return
        try:
            for status in RunFollower(self._cluster, run, timings=self._timings).statuses():
                # The TransferJob says why its Job is deleted: it is suspended, changed or canceled.
                if isinstance(status, RunStatus) and (status.was_deleted or not self._is_current(status)):
                    return
                yield status
        except RunGoneError:
            return

    def _is_current(self, status: RunStatus) -> bool:
        """Return whether a status is that of the current spec: a changed spec replaces a run that just finished."""
        if not status.is_finished:
            return True
        obj = require_transfer_job(self._cluster, self._name)
        return is_processed(obj) and read_transfer_job_status(obj).run == status.run
