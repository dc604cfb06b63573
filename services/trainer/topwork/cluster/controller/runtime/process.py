"""The process of the controller: watches fill a cache and a queue, and workers reconcile while it holds the Lease."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from topwork import __version__
from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.prometheus.controller import ControllerMetrics, TransferJobSample, TransferSearchSample
from topwork.cluster.controller.dispatch import Dispatcher
from topwork.cluster.controller.object_cache import Key
from topwork.cluster.controller.runtime.http_server import HttpServer
from topwork.cluster.controller.runtime.leader_election import LeaderElection
from topwork.cluster.controller.runtime.operator import TransferJobWatch
from topwork.cluster.controller.runtime.samples import to_sample, to_search_sample
from topwork.cluster.controller.runtime.watches import ObjectWatch, SearchWatch, Watch
from topwork.cluster.controller.runtime.webhook import WebhookServer
from topwork.cluster.controller.runtime.work_queue import WorkQueue, WorkQueueSettings
from topwork.cluster.controller.searches.search_cache import SearchKey

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5
# A reconciliation sends about ten requests; each is retried for up to three minutes during an outage.
MAX_RECONCILE_SECONDS = 1800.0
# Within the default grace period of a pod, 30 s, together with the release of the Lease.
STOP_SECONDS = 20.0
EXIT_STOPPED, EXIT_LEASE_LOST = 0, 1


@dataclass(frozen=True)
class ProcessSettings:
    """Settings of the process.

    Attributes:
        namespaces: Namespaces of the TransferJobs and TransferSearches; empty for all namespaces.
        workers: Number of TransferJobs and TransferSearches that are reconciled at the same time.
        http_port: Port of metrics and probes; 0 selects a free port.
    """

    namespaces: tuple[str, ...]
    workers: int
    http_port: int


class ControllerProcess:
    """All threads of the controller.

    Args:
        cluster: The cluster.
        dispatcher: Caches the watched objects, and reconciles TransferJobs and TransferSearches.
        election: Candidate for the Lease.
        webhook: Server of the webhook, if it is enabled.
        settings: Settings.
    """

    def __init__(
        self,
        cluster: "Cluster",
        dispatcher: Dispatcher,
        election: LeaderElection,
        webhook: WebhookServer | None,
        settings: ProcessSettings,
    ) -> None:
        self._dispatcher, self._election, self._webhook, self._settings = dispatcher, election, webhook, settings
        self._metrics = ControllerMetrics(self._samples, __version__, self._search_samples)
        self._queue: WorkQueue[Key | SearchKey] = WorkQueue(
            dispatcher.reconcile,
            WorkQueueSettings(workers=settings.workers),
            lambda success, seconds: self._metrics.observe_reconcile("ok" if success else "error", seconds),
        )
        scopes = settings.namespaces or (None,)
        self._watches: list[Watch] = [
            *(TransferJobWatch(cluster, scope, self._handle, dispatcher.cache.transfer_jobs) for scope in scopes),
            *(SearchWatch(cluster, scope, self._handle) for scope in scopes),
            *(ObjectWatch(cluster, kind, scope, self._handle) for kind in ("Job", "Pod") for scope in scopes),
        ]

    def run(self, stop: threading.Event) -> int:
        """Run until a stop is requested or the Lease is lost.

        Args:
            stop: The stop request.

        Returns:
            The exit code: 0 after a stop, 1 if another replica has to take over.
        """
        server = HttpServer(
            self._settings.http_port, metrics=self._page, health=self._health, readiness=self._readiness
        )
        if self._webhook:
            self._webhook.start()
        for watch in self._watches:
            watch.start()
        namespaces = ", ".join(self._settings.namespaces) or "all"
        log.info("controller started", version=__version__, namespaces=namespaces, http_port=server.port)
        if self._wait_until_synced(stop):
            self._election.start()
            while not self._election.wait(POLL_SECONDS) and not stop.is_set():
                pass
        if self._election.is_leader and not stop.is_set():
            self._queue.start()
            while not stop.wait(POLL_SECONDS):
                if self._election.is_lost:
                    log.error("Lease lost: the process ends, and another one continues")
                    return EXIT_LEASE_LOST
        return self._stop()

    def _stop(self) -> int:
        log.info("stopping", seconds=STOP_SECONDS)
        for watch in self._watches:
            watch.stop()
        if self._queue.stop(STOP_SECONDS):
            self._election.release()
        else:  # the Lease protects the reconciliations in progress until it expires
            log.warning("reconciliations did not end in time")
        return EXIT_STOPPED

    def _wait_until_synced(self, stop: threading.Event) -> bool:
        while not stop.wait(POLL_SECONDS):
            if all(watch.is_synced for watch in self._watches):
                counts = {
                    "transferjobs": len(self._dispatcher.cache.transfer_jobs()),
                    "transfersearches": len(self._dispatcher.search_cache.searches()),
                }
                log.info("watches synced", **counts)
                return True
        return False

    def _handle(self, event_type: str, obj: KubernetesObject) -> None:
        for key in self._dispatcher.update(event_type, obj):
            self._queue.add(key)

    # ── Pages ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _page(self) -> tuple[bytes, str]:
        self._metrics.set_queue(self._queue.depth, self._queue.oldest_seconds)
        self._metrics.set_leader(self._election.is_leader)
        return self._metrics.page()

    def _samples(self) -> Iterator[TransferJobSample]:
        return map(to_sample, self._dispatcher.cache.transfer_jobs())

    def _search_samples(self) -> Iterator[TransferSearchSample]:
        return map(to_search_sample, self._dispatcher.search_cache.searches())

    def _health(self) -> list[str]:
        problems = [self._queue.problem(MAX_RECONCILE_SECONDS), self._election.problem()]
        return [problem for problem in (*problems, *(part.problem() for part in self._parts())) if problem]

    def _readiness(self) -> list[str]:
        return [part.error for part in self._parts() if part.error]

    def _parts(self) -> list[Watch | WebhookServer]:
        return [*self._watches, self._webhook] if self._webhook else [*self._watches]
