"""Container logs of the API server used in tests."""

import threading
from datetime import UTC, datetime, timedelta

from api_kinds import Object


class Log:
    """Lines of a container log with timestamps (RFC 3339, nanoseconds); `ended` if the container has terminated."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.ended = False


class Logs:
    """Logs by pod and container."""

    def __init__(self, changed: threading.Condition) -> None:
        self.changed = changed
        self._logs: dict[tuple[str, str], Log] = {}

    def get(self, pod: str, container: str) -> Log | None:
        return self._logs.get((pod, container))

    def append(self, pod: str, container: str, lines: tuple[str, ...], at: str | None) -> None:
        with self.changed:
            log = self._logs.setdefault((pod, container), Log())
            log.lines += [(at or now(), line) for line in lines]
            self.changed.notify_all()

    def end(self, pod: str, container: str) -> None:
        with self.changed:
            self._logs.setdefault((pod, container), Log()).ended = True
            self.changed.notify_all()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")


def select_lines(log: Log, query: dict[str, str]) -> list[tuple[str, str]]:
    """Apply `sinceTime` (in full seconds, like the kubelet), `sinceSeconds` and `tailLines`."""
    lines = log.lines
    since = query.get("sinceTime", "")[:19]
    if seconds := query.get("sinceSeconds"):
        since = (datetime.now(UTC) - timedelta(seconds=int(seconds))).strftime("%Y-%m-%dT%H:%M:%S")
    if since:
        lines = [line for line in lines if line[0][:19] >= since]
    if tail := query.get("tailLines"):
        lines = lines[-int(tail) :] if int(tail) else []
    return lines


def container_state(pod: Object, container: str) -> dict[str, Object] | None:
    """Return the state of a container from the status of its pod, such as {"running": {...}}, or None."""
    status = pod.get("status", {})
    for container_status in status.get("initContainerStatuses", []) + status.get("containerStatuses", []):
        if container_status["name"] == container:
            return container_status.get("state", {})
    return None


def has_container(pod: Object, container: str) -> bool:
    spec = pod.get("spec", {})
    return any(item["name"] == container for item in spec.get("initContainers", []) + spec.get("containers", []))
