"""Container logs as one continuous stream, resumed after interruptions without losing or repeating a line."""

# The official client reads a log over a single connection. `sinceTime` has a resolution of one second, so a resumed
# log repeats the lines of the last second; they are counted here and dropped.

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from topwork.clients.kubernetes.api_request import KINDS, ApiRequest
from topwork.clients.kubernetes.connection import ClusterSettings
from topwork.clients.kubernetes.errors import (
    ContainerNotStartedError,
    IdleTimeoutError,
    NotFoundError,
    TransientError,
)
from topwork.clients.kubernetes.rest_client import RestClient

# 2026-01-02T03:04:05.123456789Z text
TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d) ")


class LogPosition:
    """Position in a log: the second to resume from, and the lines of that second that were already read.

    Attributes:
        since: Time to resume from; None for the beginning.
        has_lines: Whether a line was read.
    """

    def __init__(self, since: str | None) -> None:
        self.since = since
        self.has_lines = False
        self._first_timestamp = ""
        self._seen: Counter[str] = Counter()
        self._repeated: Counter[str] = Counter()

    def resume(self) -> None:
        """Expect the lines of the last second again, because a new stream starts."""
        self._repeated = self._seen.copy()

    def accept(self, line: str) -> bool:
        """Record a line and return whether it is new."""
        if self._repeated[line] > 0:
            self._repeated[line] -= 1
            return False
        if match := TIMESTAMP.match(line):
            second = match[1] + match[3]
            if match[0] < self._first_timestamp:  # a line before the requested tail, in the same second
                return False
            if second != self.since or not self.has_lines:
                self._seen.clear()
            self._first_timestamp = self._first_timestamp or match[0]
            self.since, self.has_lines = second, True
            self._seen[line] += 1
        return True


class Outage:
    """Consecutive failures to read a log, and when they started.

    Attributes:
        failures: Failures since the last line.
    """

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """Record that the log can be read again."""
        self.failures, self._started = 0, time.monotonic()

    def is_final(self, follow: bool) -> bool:
        """Count a failure and return whether to give up."""
        self.failures += 1
        is_too_long = time.monotonic() - self._started >= self._settings.log_outage_seconds
        return self.failures >= self._settings.attempts and (is_too_long or not follow)


class LogReader:
    """Reads the log of a container; see `Cluster.logs`.

    Args:
        client: Client of the API server.
        request: Request for the log, without query parameters.
        container: Name of the container.
    """

    def __init__(self, client: RestClient, request: ApiRequest, container: str) -> None:
        self._client, self._request, self._container = client, request, container

    def read(self, *, follow: bool, since: str | None, tail: int | None, timestamps: bool) -> Iterator[str]:
        """Yield lines."""
        position = LogPosition(since)
        outage = Outage(self._client.settings)
        while True:
            try:
                for line in self._stream(position, follow, tail):
                    outage.reset()
                    yield line if timestamps else TIMESTAMP.sub("", line, count=1)
                outage.reset()
            except (ContainerNotStartedError, NotFoundError):
                return
            except IdleTimeoutError:
                if not follow:
                    raise
            except TransientError as error:
                if outage.is_final(follow):
                    raise
                time.sleep(self._client.backoff_seconds(outage.failures, error))
                continue
            if not follow:
                return
            # A stream can end before its container. Once the container has ended, read the log one last time
            # without following it, so that no line between the two ends is lost.
            follow = not self._is_terminated()
            if follow:
                time.sleep(self._client.settings.backoff_seconds)

    def _stream(self, position: LogPosition, follow: bool, tail: int | None) -> Iterator[str]:
        query: dict[str, Any] = {
            "container": self._container,
            "timestamps": "true",
            "follow": "true" if follow else None,
            "sinceTime": position.since,
            "tailLines": None if position.has_lines else tail,
        }
        position.resume()
        settings = self._client.settings
        read_timeout = settings.stream_seconds if follow else settings.timeout_seconds
        with self._client.stream(replace(self._request, query=query), read_timeout) as lines:
            yield from filter(position.accept, lines)

    def _is_terminated(self) -> bool:
        """Return whether the container has ended or its pod is deleted."""
        try:
            pod = self._client.send(ApiRequest("read", KINDS["Pod"], self._request.namespace, self._request.name))
        except NotFoundError:
            return True
        status = pod.get("status", {})
        containers = (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or [])
        is_terminated = any(
            container["name"] == self._container and "terminated" in container.get("state", {})
            for container in containers
        )
        return is_terminated or status.get("phase") in {"Succeeded", "Failed"}
