"""Watches: changes of objects as one continuous stream, across broken connections and expired versions."""

# The official Watch and SharedInformer are not used: Watch does not list again after 410 when it has a timeout, stops
# at the first broken connection and turns invalid lines into None; SharedInformer needs a thread and logs errors
# instead of raising them. Neither can shorten the read timeout as the end of the watch approaches.

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.api_request import ApiRequest
from topwork.clients.kubernetes.errors import (
    IdleTimeoutError,
    ResourceExpiredError,
    TransientError,
    response_error,
    unexpected_response_error,
)
from topwork.clients.kubernetes.rest_client import LineStream, RestClient


class WatchEvent(NamedTuple):
    """A change of an object.

    Attributes:
        type: ADDED, MODIFIED or DELETED.
        object: The object after the change; for DELETED, its last state.
    """

    type: str
    object: KubernetesObject


class Watcher:
    """Lists objects and then watches them; see `Cluster.watch`.

    Args:
        client: Client of the API server.
        request: The list request, with its selectors.
    """

    def __init__(self, client: RestClient, request: ApiRequest) -> None:
        self._client, self._request = client, request
        self._objects: dict[str, KubernetesObject] = {}
        self._resource_version = ""

    def events(self, seconds: float) -> Iterator[WatchEvent]:
        """Yield existing objects as ADDED, then changes, for `seconds`."""
        deadline = time.monotonic() + seconds
        failures = 0
        while True:
            if not self._resource_version:
                yield from self._list()
            if time.monotonic() >= deadline:
                return
            try:
                for event in self._stream(deadline):
                    failures = 0
                    yield event
                failures = 0
            except ResourceExpiredError:
                self._resource_version = ""
            except IdleTimeoutError:
                continue
            except TransientError as error:
                failures += 1
                if failures >= self._client.settings.attempts:
                    raise
                delay = min(self._client.backoff_seconds(failures, error), deadline - time.monotonic())
                time.sleep(max(0.0, delay))

    def _list(self) -> Iterator[WatchEvent]:
        objects, self._resource_version = self._client.list_all(self._request)
        previous, self._objects = self._objects, {obj["metadata"]["uid"]: obj for obj in objects}
        for uid, deleted in previous.items():
            if uid not in self._objects:
                yield WatchEvent("DELETED", deleted)
        for obj in objects:
            yield WatchEvent("ADDED", obj)

    def _stream(self, deadline: float) -> Iterator[WatchEvent]:
        # The server ends the stream after `duration`; if it sends nothing for longer, the connection is dead.
        remaining = deadline - time.monotonic()
        duration = min(remaining, self._client.settings.stream_seconds)
        read_timeout = duration + self._client.settings.timeout_seconds
        query = self._request.query | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._resource_version,
            "timeoutSeconds": max(1, math.ceil(duration)),
        }
        request = replace(self._request, verb="watch", query=query)
        with self._client.stream(request, max(0.001, min(remaining, read_timeout))) as lines:
            for line in lines:
                if event := self._parse_event(line, request):
                    yield event
                _limit_read_timeout(lines, deadline, read_timeout)

    def _parse_event(self, line: str, request: ApiRequest) -> WatchEvent | None:
        """Parse a line of the stream and record its resourceVersion; None for a bookmark."""
        context = self._client.describe(request)
        try:
            content = json.loads(line)
            event = WatchEvent(content["type"], content["object"])
        except (ValueError, KeyError, TypeError) as error:
            raise unexpected_response_error(line.encode(), context) from error
        if event.type == "ERROR":
            code = int(event.object.get("code") or 500)
            raise response_error(code, json.dumps(event.object).encode(), {}, context)
        metadata = event.object["metadata"]
        self._resource_version = metadata["resourceVersion"]
        if event.type == "BOOKMARK":
            return None
        if event.type == "DELETED":
            self._objects.pop(metadata["uid"], None)
        else:
            self._objects[metadata["uid"]] = event.object
        return event


def _limit_read_timeout(lines: LineStream, deadline: float, read_timeout: float) -> None:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise IdleTimeoutError
    lines.set_read_timeout(min(remaining, read_timeout))
