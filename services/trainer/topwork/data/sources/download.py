"""Files on web servers: their version, their size, and downloads that are retried and resumed."""

import errno
import http
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit, urlunsplit

from urllib3 import BaseHTTPResponse, HTTPHeaderDict, Retry
from urllib3.exceptions import InvalidHeader, MaxRetryError

from topwork.data.sources.http_client import StatusError, TransientError, open_url
from topwork.errors import UnavailableError

ATTEMPTS = 5

BACKOFF_SECONDS = 1.0
"""The first retry does not wait, the second waits for twice this time, and each further retry waits twice as long."""

MAX_BACKOFF_SECONDS = 30.0

MAX_RETRY_AFTER_SECONDS = 120.0
"""Longest wait that a server can request with the Retry-After header."""

STALL_SECONDS = 60.0
STALL_BYTES = 256 * 2**10
"""A download that receives less than this in `STALL_SECONDS` (4 KiB/s) would not finish in time."""

MAX_SECONDS = 12 * 3600.0
"""All attempts together: half of the default deadline of a job, enough for 4 TB at 100 MB/s."""

_CHUNK_BYTES = 2**20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_CONTENT_LENGTH = re.compile(r"[0-9]{1,18}")

T = TypeVar("T")


class RemoteFile:
    """A file on a web server.

    Example:
        ```python
        file = RemoteFile("https://example.com/cats.zip")
        file.download(Path("cats.zip"))
        ```

    Attributes:
        display_url: URL for messages, without the query: it may contain a signature.
    """

    def __init__(self, url: str, on_progress: Callable[[], None] | None = None) -> None:
        """Create a remote file; nothing is requested yet.

        Args:
            url: http(s) URL.
            on_progress: Called for each chunk that arrives.
        """
        parts = urlsplit(url)
        self.display_url = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
        self._url = url
        self._on_progress = on_progress
        # Identifies the content of the partial file, for If-Range.
        self._validator: str | None = None
        self._supports_head = True

    def version(self) -> str | None:
        """Return a string that changes when the file changes, from the response headers.

        Returns:
            The ETag or modification date with the length; None if the server sends neither.

        Raises:
            DataError: If the server rejects the request, or the URL or a redirect points to a forbidden address.
            SettingError: If the certificate is not trusted, or a hop uses plain HTTP on a public network.
            UnavailableError: If the server cannot be reached.
        """
        headers = self._retry(self._read_headers)
        length = headers.get("Content-Length")
        if etag := headers.get("ETag"):
            return f"{etag} {length}"
        if modified := headers.get("Last-Modified"):
            return f"{self._url} {modified} {length}"
        return None

    def size(self) -> int | None:
        """Return the size in bytes, or None if the server does not send it.

        Raises:
            DataError: If the server rejects the request, or the URL or a redirect points to a forbidden address.
            SettingError: If the certificate is not trusted, or a hop uses plain HTTP on a public network.
            UnavailableError: If the server cannot be reached.
        """
        length = self._retry(self._read_headers).get("Content-Length") or ""
        return int(length) if _CONTENT_LENGTH.fullmatch(length) else None

    def download(self, path: Path) -> None:
        """Download the file.

        A connection that breaks is resumed with a range request, unless the file has changed.

        Args:
            path: Destination. The content is written to `<path>.part` until it is complete.

        Raises:
            DataError: If the server rejects the request, or the URL or a redirect points to a forbidden address.
            SettingError: If the certificate is not trusted, or a hop uses plain HTTP on a public network.
            UnavailableError: If all attempts fail, or the download takes longer than `MAX_SECONDS`.
            OSError: If the disk is full.
        """
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        deadline = time.monotonic() + MAX_SECONDS
        self._retry(lambda: self._download_part(part, deadline))
        part.replace(path)

    def _open(self, method: str, headers: Mapping[str, str] | None = None) -> AbstractContextManager[BaseHTTPResponse]:
        return open_url(method, self._url, self.display_url, headers)

    def _read_headers(self) -> Mapping[str, str]:
        """Return the headers of the complete file, from a HEAD request if the server answers it."""
        if self._supports_head:
            with suppress(StatusError, TransientError), self._open("HEAD") as response:
                if response.headers.get("ETag") or response.headers.get("Last-Modified"):
                    return response.headers
            self._supports_head = False
        # Some servers reject or ignore HEAD, or omit headers. The first byte has the same headers as the file.
        with self._open("GET", {"Range": "bytes=0-0"}) as response:
            headers = dict(response.headers)
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                total = _CONTENT_RANGE.fullmatch(headers.get("Content-Range") or "")
                headers["Content-Length"] = total[2] if total else ""
            return HTTPHeaderDict(headers)

    def _download_part(self, part: Path, deadline: float) -> None:
        """Download the rest of the file, or all of it if the server does not resume."""
        offset = part.stat().st_size if part.exists() and self._validator else 0
        headers = {"Range": f"bytes={offset}-", "If-Range": self._validator} if offset and self._validator else {}
        with self._open("GET", headers) as response:
            start = _start_offset(response)
            if start not in (0, offset):
                raise TransientError(f"the server was asked to resume at byte {offset} but resumed at byte {start}")
            self._validator = _strong_validator(response)
            with part.open("ab" if start else "wb") as file:
                self._copy(response, file, deadline)
            if missing := response.length_remaining:
                received = part.stat().st_size
                raise TransientError(f"the connection closed after {received} of {received + missing} bytes")

    def _copy(self, response: BaseHTTPResponse, file: IO[bytes], deadline: float) -> None:
        """Write the body to a file, as long as it arrives fast enough."""
        window_start, window_bytes = time.monotonic(), 0
        # read1() returns what has arrived; read() would wait for a full chunk, however slow the server is.
        while chunk := response.read1(_CHUNK_BYTES, decode_content=False):
            file.write(chunk)
            if self._on_progress:
                self._on_progress()
            window_bytes += len(chunk)
            now = time.monotonic()
            if now > deadline:
                raise UnavailableError(
                    f"{self.display_url} was not downloaded within {MAX_SECONDS / 3600:g} hours. Copy the file to S3 "
                    "and use its s3:// URI."
                )
            if (elapsed := now - window_start) > STALL_SECONDS:
                if window_bytes < STALL_BYTES:
                    raise TransientError(f"received only {window_bytes} bytes in {elapsed:.0f} seconds")
                window_start, window_bytes = now, 0

    def _retry(self, action: Callable[[], T]) -> T:
        """Call `action` until it succeeds, with the backoff of urllib3's Retry.

        urllib3 itself does not retry an interrupted body, and reads the body of an error response into memory.
        """
        retry = Retry(
            ATTEMPTS - 1,
            backoff_factor=BACKOFF_SECONDS,
            backoff_max=MAX_BACKOFF_SECONDS,
            backoff_jitter=BACKOFF_SECONDS,
            retry_after_max=MAX_RETRY_AFTER_SECONDS,  # type: ignore[arg-type] # the stubs require int
        )
        while True:
            try:
                return action()
            except TransientError as error:
                failure = error
            except OSError as error:
                if error.errno in _DISK_FULL:
                    raise
                failure = TransientError(str(error) or type(error).__name__)
            if failure.response and failure.response.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._validator = None  # the file is now shorter: start again
            try:
                retry = retry.increment("GET", error=failure)
            except MaxRetryError:
                raise UnavailableError(
                    f"{self.display_url} could not be downloaded in {ATTEMPTS} attempts: {failure}. Check the address "
                    "and the network (https_proxy, firewall), or copy the file to S3 and use its s3:// URI."
                ) from failure
            _wait(retry, failure.response)


def _wait(retry: Retry, response: BaseHTTPResponse | None) -> None:
    try:
        retry.sleep(response)
    except (InvalidHeader, ValueError, OverflowError):
        retry.sleep()  # Retry-After is neither a number nor a date


def _start_offset(response: BaseHTTPResponse) -> int:
    """Return the position in the file at which the body starts, or -1 if the server does not send it."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range") or "")
    return int(match[1]) if match else -1


def _strong_validator(response: BaseHTTPResponse) -> str | None:
    """Return the value for If-Range that identifies this content (RFC 9110, 13.1.5), or None if there is none."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
