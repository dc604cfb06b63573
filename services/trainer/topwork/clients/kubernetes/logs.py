"""The log of a container as an unbroken stream: taken up where it broke off, no line lost, none twice."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from topwork.clients.kubernetes.config import ClusterSettings
from topwork.clients.kubernetes.errors import MissingError, NotStartedError, PassingError, QuietError
from topwork.clients.kubernetes.requests import KINDS, Api, Asked

# 2026-01-02T03:04:05.123456789Z text
STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:\d\d) ")


class Position:
    """How far a log is read. The server goes on from whole seconds: the lines of the last one are kept.

    Attributes:
        since: Time to go on from; None: the beginning.
    """

    def __init__(self, since: str | None) -> None:
        self.since = since
        self.begun = False
        self._first = ""
        self._seen: Counter[str] = Counter()
        self._again: Counter[str] = Counter()

    def resume(self) -> None:
        """The stream begins anew: the lines of the last second come again."""
        self._again = self._seen.copy()

    def is_new(self, line: str) -> bool:
        """Whether a line was not there before; counts it."""
        if self._again[line] > 0:
            self._again[line] -= 1
            return False
        if found := STAMPED.match(line):
            second = found[1] + found[3]
            if found[0] < self._first:  # of the same second, and before the last lines that were asked for
                return False
            if second != self.since or not self.begun:
                self._seen.clear()
            self._first = self._first or found[0]
            self.since, self.begun = second, True
            self._seen[line] += 1
        return True


class Breaks:
    """How often, and for how long, a log was broken off without a line between."""

    def __init__(self, settings: ClusterSettings) -> None:
        self._settings = settings
        self.over()

    def over(self) -> None:
        """It goes on."""
        self.count, self._since = 0, time.monotonic()

    def are_enough(self, follow: bool) -> bool:
        """Count one more break, and say whether that is enough to give up."""
        self.count += 1
        too_long = time.monotonic() - self._since >= self._settings.patience_seconds
        return self.count >= self._settings.attempts and (too_long or not follow)


class LogReader:
    """Reads the log of one container.

    Args:
        api: The API server.
        asked: Request for the log, without query.
        container: Name of the container.
    """

    def __init__(self, api: Api, asked: Asked, container: str) -> None:
        self._api, self._asked, self._container = api, asked, container

    def read(self, *, follow: bool, since: str | None, tail: int | None, timestamps: bool) -> Iterator[str]:
        """Yield lines; see `Cluster.logs`."""
        position = Position(since)
        breaks = Breaks(self._api.settings)
        while True:
            try:
                for line in self._lines(position, follow, tail):
                    breaks.over()
                    yield line if timestamps else STAMPED.sub("", line, count=1)
                breaks.over()
            except (NotStartedError, MissingError):
                return
            except QuietError:
                if not follow:
                    raise
            except PassingError as error:
                if breaks.are_enough(follow):
                    raise
                time.sleep(self._api.pause(breaks.count, error))
                continue
            if not follow:
                return
            # A stream can end before its container does. When both have, one more look: nothing may have been missed.
            follow = not self._is_over()
            if follow:
                time.sleep(self._api.settings.pause_seconds)

    def _lines(self, position: Position, follow: bool, tail: int | None) -> Iterator[str]:
        query: dict[str, Any] = {"container": self._container, "timestamps": "true"}
        query |= {"follow": "true" if follow else None, "sinceTime": position.since}
        query |= {"tailLines": None if position.begun else tail}
        asked = replace(self._asked, query=query)
        position.resume()
        wait = self._api.settings.stream_seconds if follow else self._api.settings.timeout_seconds
        with self._api.stream(asked, wait) as lines:
            yield from filter(position.is_new, lines)

    def _is_over(self) -> bool:
        """Whether the container has ended, or its pod is gone."""
        try:
            pod = self._api.ask(Asked("read", KINDS["Pod"], self._asked.namespace, self._asked.name))
        except MissingError:
            return True
        status = pod.get("status", {})
        states = (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or [])
        ended = any(each["name"] == self._container and "terminated" in each.get("state", {}) for each in states)
        return ended or status.get("phase") in {"Succeeded", "Failed"}
