"""Changes of objects as an unbroken stream: whatever becomes of the connection, no state that lasts is missed."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import GoneError, PassingError, QuietError, garbage, refused
from topwork.clients.kubernetes.requests import Api, Asked, Lines


class Change(NamedTuple):
    """Something that happened to an object.

    Attributes:
        type: ADDED, MODIFIED or DELETED.
        object: The object as it is now; of one that is gone, as it was last.
    """

    type: str
    object: KubernetesObject


class Watch:
    """Watches objects; see `Cluster.watch`.

    Args:
        api: The API server.
        asked: Request for the list, with its selectors.
    """

    def __init__(self, api: Api, asked: Asked) -> None:
        self._api, self._asked = api, asked
        self._known: dict[str, KubernetesObject] = {}
        self._version = ""

    def changes(self, seconds: float) -> Iterator[Change]:
        """Yield what is there, then what happens, until `seconds` are over."""
        ends = time.monotonic() + seconds
        failures = 0
        while True:
            if not self._version:
                yield from self._list()
            if (left := ends - time.monotonic()) <= 0:
                return
            try:
                for change in self._stream(ends, left):
                    failures = 0
                    yield change
                failures = 0
            except GoneError:
                self._version = ""
            except QuietError:
                continue
            except PassingError as error:
                failures += 1
                if failures >= self._api.settings.attempts:
                    raise
                time.sleep(max(0.0, min(self._api.pause(failures, error), ends - time.monotonic())))

    def _list(self) -> Iterator[Change]:
        found, self._version = self._api.items(self._asked)
        before, self._known = self._known, {each["metadata"]["uid"]: each for each in found}
        for uid, gone in before.items():
            if uid not in self._known:
                yield Change("DELETED", gone)
        for each in found:
            yield Change("ADDED", each)

    def _stream(self, ends: float, left: float) -> Iterator[Change]:
        # The server ends the stream after a while; silence for longer means that the connection is dead.
        lasts = min(left, self._api.settings.stream_seconds)
        query = self._asked.query | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": max(1, math.ceil(lasts)),
        }
        asked = replace(self._asked, verb="watch", query=query)
        with self._api.stream(asked, min(left, lasts + self._api.settings.timeout_seconds)) as lines:
            for line in lines:
                if change := self._change(line, asked):
                    yield change
                _wait_until(ends, lines, lasts + self._api.settings.timeout_seconds)

    def _change(self, line: str, asked: Asked) -> Change | None:
        try:
            event = json.loads(line)
            type_, found = event["type"], event["object"]
        except (ValueError, KeyError, TypeError) as error:
            raise garbage(line.encode(), self._api.place(asked)) from error
        if type_ == "ERROR":
            raise refused(int(found.get("code") or 500), json.dumps(found).encode(), {}, self._api.place(asked))
        self._version = found["metadata"]["resourceVersion"]
        if type_ == "BOOKMARK":
            return None
        uid = found["metadata"]["uid"]
        if type_ == "DELETED":
            self._known.pop(uid, None)
        else:
            self._known[uid] = found
        return Change(type_, found)


def _wait_until(ends: float, lines: Lines, longest: float) -> None:
    left = ends - time.monotonic()
    if left <= 0:
        raise QuietError
    lines.wait_at_most(min(left, longest))
