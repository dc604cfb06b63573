"""Ends answers of an S3 server that fall so slow that they never end; a part of `edge.storage_client`.

The time-outs of sockets count from one byte to the next: a server that sends a byte now and then holds them off for
ever. Here an answer must go on by a piece, of the size in which it is read, within the time-out, or come to its end.
"""

import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from botocore import exceptions as boto

# How often progress is looked at, as a part of the time that it may take.
LOOKS = 4
FIRST_ERROR = 300


@dataclass
class _Watched:
    response: "weakref.ref[Any]"
    taken: int
    since: float


class Watch:
    """Sends the requests of one client and watches how the answers come in. Safe to use from several threads."""

    def __init__(self, session: Any, seconds: float) -> None:
        """Prepare the watch.

        Args:
            session: HTTP session of the client (`botocore.httpsession.URLLib3Session`).
            seconds: Time that the next piece of an answer may take.
        """
        self._session, self._seconds = session, seconds
        self._watched: list[_Watched] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def send(self, request: Any, **_: object) -> Any:
        """Send a request; a handler for botocore's event before-send.

        Args:
            request: The signed request (`botocore.awsrequest.AWSPreparedRequest`).

        Returns:
            Its answer; what is not read as a stream has arrived, as long as it said that it is.

        Raises:
            botocore.exceptions.HTTPClientError: If there is no answer, or it breaks off. botocore tries again.
        """
        is_stream, request.stream_output = request.stream_output, True
        try:
            response = self._session.send(request)
        finally:
            request.stream_output = is_stream
        # The length of an answer in chunks is not known, nor how much of it came.
        if response.raw.length_remaining:
            self._begin(response.raw)
        # What is wrong stands in the body: half of one would be taken for another error.
        if not is_stream or response.status_code >= FIRST_ERROR:
            _read(request, response)
        return response

    def _begin(self, raw: Any) -> None:
        with self._lock:
            self._watched.append(_Watched(weakref.ref(raw), raw.tell(), time.monotonic()))
            if self._thread is None:
                self._thread = threading.Thread(target=self._look_after, name="storage-watch", daemon=True)
                self._thread.start()

    def _look_after(self) -> None:
        while True:
            time.sleep(self._seconds / LOOKS)
            with self._lock:
                self._watched = [watched for watched in self._watched if self._goes_on(watched)]
                if not self._watched:
                    self._thread = None
                    return

    def _goes_on(self, watched: _Watched) -> bool:
        raw = watched.response()
        if raw is None or raw.closed or not raw.length_remaining:
            return False
        now = time.monotonic()
        if (taken := raw.tell()) != watched.taken:
            watched.taken, watched.since = taken, now
        elif now - watched.since > self._seconds:
            # Who waits for the rest is told of an end that came too early.
            with suppress(OSError, RuntimeError, ValueError):
                raw.shutdown()
            return False
        return True


def _read(request: Any, response: Any) -> None:
    """Read all of an answer: botocore itself takes one that breaks off for a whole one."""
    stated = response.headers.get("Content-Length")
    try:
        arrived = len(response.content)
    except Exception as error:
        raise boto.ConnectionClosedError(endpoint_url=request.url, error=error, request=request) from error
    if request.method != "HEAD" and stated not in {None, str(arrived)}:
        said = f"{arrived} of {stated} bytes came"
        raise boto.ConnectionClosedError(endpoint_url=request.url, error=said, request=request)
