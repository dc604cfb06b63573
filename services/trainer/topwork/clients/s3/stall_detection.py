"""Aborts S3 responses that arrive too slowly to ever complete.

The read timeout of a socket restarts with every byte, so a server that occasionally sends one byte never triggers it.
Here, a response must deliver the next complete chunk that is read from it within the timeout.
"""

import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from botocore import exceptions as boto

# Progress checks per timeout.
CHECKS_PER_TIMEOUT = 4
FIRST_ERROR_STATUS = 300


@dataclass
class _OpenResponse:
    raw: "weakref.ref[Any]"
    bytes_read: int
    last_progress: float


class StallDetector:
    """Sends the requests of one S3 client and aborts responses that stall. Thread-safe."""

    def __init__(self, session: Any, timeout_seconds: float) -> None:
        """Create a detector.

        Args:
            session: HTTP session that sends the requests (`botocore.httpsession.URLLib3Session`).
            timeout_seconds: Maximum time between two chunks of a response.
        """
        self._session, self._timeout_seconds = session, timeout_seconds
        self._responses: list[_OpenResponse] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def send(self, request: Any, **_: object) -> Any:
        """Send a request, as a handler for the botocore event before-send: botocore uses the result instead of sending.

        Args:
            request: The signed request (`botocore.awsrequest.AWSPreparedRequest`).

        Returns:
            The response. Its body has been received completely, unless the caller reads it as a stream.

        Raises:
            botocore.exceptions.HTTPClientError: If there is no response or it is incomplete. botocore retries.
        """
        is_stream, request.stream_output = request.stream_output, True
        try:
            response = self._session.send(request)
        finally:
            request.stream_output = is_stream
        # The length of a chunked response is unknown, and so is how much of it has arrived.
        if response.raw.length_remaining:
            self._watch(response.raw)
        # The error code is in the body: a truncated body would be mistaken for a different error.
        if not is_stream or response.status_code >= FIRST_ERROR_STATUS:
            _read_body(request, response)
        return response

    def _watch(self, raw: Any) -> None:
        with self._lock:
            self._responses.append(_OpenResponse(weakref.ref(raw), raw.tell(), time.monotonic()))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="storage-stall-detection", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            while self._check_responses():
                time.sleep(self._timeout_seconds / CHECKS_PER_TIMEOUT)
        except BaseException:
            # Without this, no thread would be started again, and a stalled response would block forever.
            with self._lock:
                self._thread, self._responses = None, []
            raise

    def _check_responses(self) -> bool:
        """Abort stalled responses; returns False, and ends the thread, if no response is left."""
        with self._lock:
            self._responses = [response for response in self._responses if self._is_arriving(response)]
            if not self._responses:
                self._thread = None
            return bool(self._responses)

    def _is_arriving(self, response: _OpenResponse) -> bool:
        raw = response.raw()
        if raw is None or raw.closed or not raw.length_remaining:
            return False
        now = time.monotonic()
        if (bytes_read := raw.tell()) != response.bytes_read:
            response.bytes_read, response.last_progress = bytes_read, now
        elif now - response.last_progress > self._timeout_seconds:
            # The thread that reads the body gets a premature end of file.
            with suppress(OSError, RuntimeError, ValueError):
                raw.shutdown()
            return False
        return True


def _read_body(request: Any, response: Any) -> None:
    """Read the complete body: botocore itself accepts a truncated one."""
    content_length = response.headers.get("Content-Length")
    try:
        received = len(response.content)
    except Exception as error:
        raise boto.ConnectionClosedError(endpoint_url=request.url, error=error, request=request) from error
    if request.method != "HEAD" and content_length not in {None, str(received)}:
        message = f"received {received} of {content_length} bytes"
        raise boto.ConnectionClosedError(endpoint_url=request.url, error=message, request=request)
