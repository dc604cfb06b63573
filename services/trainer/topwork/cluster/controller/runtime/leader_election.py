"""Leader election: one replica of the controller works, the others wait, and a Lease of the cluster decides which.

The rules are those of client-go's leaderelection. Clocks of different nodes are never compared: a candidate takes a
Lease over if it has not seen it change for its whole duration, measured with the candidate's own monotonic clock.
"""

# kubernetes.leaderelection is not used: its lock sends requests through the global default client, and it measures time
# with the wall clock, leaves out leaseTransitions and does not release the Lease.

import math
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import ConflictError
from topwork.errors import TopworkError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

log = structlog.get_logger(__name__)

LEASE_NAME = "topwork-controller"


@dataclass(frozen=True)
class LeaseSettings:
    """Durations of a Lease.

    Attributes:
        duration_seconds: Other candidates take the Lease over if it was not renewed for this long.
        renew_deadline_seconds: The leader stops if it could not renew the Lease for this long. The difference to the
            duration is its margin for requests in progress.
        retry_seconds: Time between two renewals, and between two attempts to acquire the Lease. A failed renewal is
            retried after a fifth of it.
    """

    duration_seconds: int = 30
    renew_deadline_seconds: float = 20.0
    retry_seconds: float = 10.0


class LeaderElection:
    """A candidate for the Lease.

    Args:
        cluster: Cluster whose default namespace contains the Lease. Its timeouts and retries must end a request well
            before the renew deadline.
        identity: Unique name of this process.
        settings: Durations.
        name: Name of the Lease.
    """

    def __init__(
        self,
        cluster: "Cluster",
        identity: str,
        settings: LeaseSettings = LeaseSettings(),
        name: str = LEASE_NAME,
    ) -> None:
        self._cluster, self._identity, self._settings, self._name = cluster, identity, settings, name
        self._observed: tuple[KubernetesObject | None, float] = (None, time.monotonic())
        self._renewed: float | None = None
        self._stop = threading.Event()
        self._acquired = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leader-election", daemon=True)

    def start(self) -> None:
        """Try to acquire the Lease, and renew it, in a thread."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait until the Lease is acquired; return whether it is."""
        return self._acquired.wait(seconds)

    @property
    def is_leader(self) -> bool:
        """Whether this process holds the Lease. Becomes false at the renew deadline even if the thread hangs."""
        renewed = self._renewed
        return renewed is not None and time.monotonic() - renewed < self._settings.renew_deadline_seconds

    @property
    def is_lost(self) -> bool:
        """Whether this process held the Lease and does not any more."""
        return self._acquired.is_set() and not self.is_leader

    def problem(self) -> str | None:
        """Return whether the thread is dead; None if it works."""
        is_running = self._thread.is_alive() or self._thread.ident is None or self._stop.is_set()
        return None if is_running else "thread leader-election is dead"

    def release(self) -> None:
        """Stop, and give the Lease up, so that another replica continues immediately."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(self._settings.renew_deadline_seconds)
        if not self.is_leader:
            return
        self._renewed = None
        try:
            lease = self._cluster.get("Lease", self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                # As client-go does: a duration of one second and no holder.
                spec = lease["spec"] | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _micro_time()}
                self._cluster.replace(lease | {"spec": spec})
        except TopworkError as error:
            log.warning("lease not released: another replica waits until it expires", reason=str(error))

    def _run(self) -> None:
        last_error = ""
        while not self._stop.is_set():
            error = self._try_once()
            if error and error != last_error:
                log.warning("lease not renewed" if self.is_leader else "lease not acquired", reason=error)
            last_error = error
            if self.is_lost:
                return
            is_urgent = bool(error) and self.is_leader
            self._stop.wait(self._settings.retry_seconds / 5 if is_urgent else self._settings.retry_seconds)

    def _try_once(self) -> str:
        """Acquire or renew the Lease; return the error, or an empty text."""
        # Other replicas count from the moment at which they see the renewal, which is later than this.
        started = time.monotonic()
        try:
            if self._acquire():
                self._renewed = started
                if not self._acquired.is_set():
                    log.info("leading", lease=self._name, identity=self._identity)
                self._acquired.set()
            elif self._renewed is not None:
                self._renewed = -math.inf  # another process took the Lease over
        except TopworkError as error:
            return str(error)
        except Exception as error:  # a malformed Lease must not end the election for good
            log.exception("unexpected error of the leader election")
            return str(error)
        return ""

    def _acquire(self) -> bool:
        lease = self._cluster.get("Lease", self._name)
        try:
            if lease is None:
                self._cluster.create(self._lease(None))
                return True
            self._observe(lease)
            if lease["spec"].get("holderIdentity") != self._identity and not self._is_expired(lease):
                return False
            self._cluster.replace(self._lease(lease))
        except ConflictError:  # another candidate was faster
            return False
        return True

    def _observe(self, lease: KubernetesObject) -> None:
        if self._observed[0] != lease["spec"]:
            self._observed = (lease["spec"], time.monotonic())

    def _is_expired(self, lease: KubernetesObject) -> bool:
        spec = lease["spec"]
        if not spec.get("holderIdentity"):
            return True
        duration = spec.get("leaseDurationSeconds") or self._settings.duration_seconds
        return time.monotonic() - self._observed[1] > float(duration)

    def _lease(self, current: KubernetesObject | None) -> KubernetesObject:
        """Return the Lease with this process as its holder."""
        now = _micro_time()
        spec = dict(current["spec"]) if current else {}
        if not current or spec.get("holderIdentity") != self._identity:
            # As in client-go, the first holder is not a transition.
            spec["leaseTransitions"] = (spec.get("leaseTransitions") or 0) + 1 if current else 0
            spec["acquireTime"] = now
        spec |= {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._settings.duration_seconds,
            "renewTime": now,
        }
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}}
        return (current or lease) | {"spec": spec}


def _micro_time() -> str:
    """Return the current time as a MicroTime of Kubernetes."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
