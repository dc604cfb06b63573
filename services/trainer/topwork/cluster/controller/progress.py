"""Progress, remaining time and metric of a running stage, from the metrics page of its pod."""

import threading
import time

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.prometheus.scrape import read_page
from topwork.cluster.names import METRICS_PORTS, StageName
from topwork.cluster.status.durations import format_duration
from topwork.cluster.status.objects import node_index, stage_containers
from topwork.cluster.status.snapshot import BestMetric, RunSnapshot
from topwork.cluster.status.snapshot_calculation import ProcessLocation, ReadingHistory, compute_snapshot
from topwork.cluster.transfer_job_status import TransferJobStatus
from topwork.errors import SettingError, UnavailableError, shorten

RETRY_SECONDS = 60.0
"""Time without further requests to a pod that did not answer, such as behind a NetworkPolicy."""
MAX_NAME_CHARACTERS = 100
"""Limit of the name of a metric: the page comes from an image that the user chooses."""


class ProgressReader:
    """Reads the progress of runs. Thread-safe.

    Args:
        timeout_seconds: Timeout of a request to a pod.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._histories: dict[str, tuple[str, ReadingHistory]] = {}
        self._retry_times: dict[str, float] = {}

    def add_progress(self, uid: str, pods: list[KubernetesObject], status: TransferJobStatus) -> TransferJobStatus:
        """Add the progress of the running stage to the status of a TransferJob.

        Args:
            uid: UID of the TransferJob.
            pods: Its pods.
            status: Its status.

        Returns:
            The status, unchanged if the pod does not answer.
        """
        # Node 0 reports the progress of all nodes.
        url = next((url for pod in pods if node_index(pod) == 0 and (url := _url_of(pod))), None)
        snapshot = self._read(uid, url) if url else None
        if snapshot is None or snapshot.run != status.run or snapshot.stage != status.stage:
            return status
        return status.model_copy(update=_describe(snapshot))

    def forget(self, uid: str) -> None:
        """Forget a TransferJob that no longer runs."""
        with self._lock:
            self._histories.pop(uid, None)
            self._retry_times.pop(uid, None)

    def _read(self, uid: str, url: str) -> RunSnapshot | None:
        with self._lock:
            if self._retry_times.get(uid, 0.0) > time.monotonic():
                return None
            known_url, history = self._histories.get(uid, ("", ReadingHistory()))
        if known_url != url:
            history = ReadingHistory()
        try:
            history.add(read_page(url, self._timeout_seconds))
        except (SettingError, UnavailableError):
            with self._lock:
                self._retry_times[uid] = time.monotonic() + RETRY_SECONDS
            return None
        with self._lock:
            self._histories[uid] = (url, history)
        return compute_snapshot(history.readings, history.readings[-1].at, ProcessLocation(url))


def _url_of(pod: KubernetesObject) -> str | None:
    """Return the URL of the metrics page of the running stage of a pod; None if no stage runs."""
    address = (pod.get("status") or {}).get("podIP")
    for container in stage_containers(pod):
        if address and (container.status.get("state") or {}).get("running"):
            return f"http://{_host(address)}:{_port_of(container.spec, container.stage)}/metrics"
    return None


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _port_of(container: KubernetesObject, stage: StageName) -> int:
    for port in container.get("ports") or ():
        if port.get("name") == f"http-{stage}":
            return int(port["containerPort"])
    return METRICS_PORTS[stage]


def _describe(snapshot: RunSnapshot) -> dict[str, str | None]:
    epochs = f"{snapshot.epoch or 0}/{snapshot.epochs} epochs" if snapshot.epochs else None
    eta = format_duration(snapshot.seconds_left) if snapshot.seconds_left is not None else None
    values = {"progress": epochs, "eta": eta}
    return values | ({"metric": _describe_metric(snapshot.best)} if snapshot.best else {})


def _describe_metric(best: BestMetric) -> str:
    name = shorten(f"{'' if best.split == 'train' else best.split + '_'}{best.name}", MAX_NAME_CHARACTERS)
    return f"{name} {best.value:.4f}"
