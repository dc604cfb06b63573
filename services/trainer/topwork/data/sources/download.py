"""Files over http(s): what state they are in, and their download, with retries."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from topwork.errors import DataError, UnavailableError

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0
TIMEOUT_SECONDS = 60.0
_CHUNK = 2**20
# Answers that another try may change (RFC 9110, RFC 6585); every other 4xx stays what it is.
_TEMPORARY = {408, 425, 429}

T = TypeVar("T")


class _TemporaryFailure(Exception):  # noqa: N818 - told as UnavailableError
    """What may go well the next time."""


class Download:
    """One file on a web server. The query of its address, which may be a signature, is never shown."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        self._uri = uri
        self.shown = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))

    def state(self) -> str | None:
        """Say in which state the file is, from the headers of its answer.

        Returns:
            Text that changes when the file does; None where the server says nothing that would.

        Raises:
            DataError: If the server refuses the file.
            UnavailableError: If it can't be reached.
        """
        return self._repeated(self._state)

    def size(self) -> int | None:
        """Ask the server how long the file is.

        Returns:
            Bytes; None where it does not say.

        Raises:
            DataError: If the server refuses the file.
            UnavailableError: If it can't be reached.
        """
        return self._repeated(self._size)

    def fetch(self, path: Path) -> None:
        """Download the whole file.

        Args:
            path: Where to; written under another name first.

        Raises:
            DataError: If the server refuses the file.
            UnavailableError: If it can't be reached, or breaks off each time.
        """
        part = path.with_name(f"{path.name}.part")
        self._repeated(lambda: self._fetch(part))
        part.replace(path)

    def _state(self) -> str | None:
        with self._open("HEAD") as answer:
            length = answer.headers.get("Content-Length")
            if tag := answer.headers.get("ETag"):
                return f"{tag} {length}"
            if changed := answer.headers.get("Last-Modified"):
                return f"{self._uri} {changed} {length}"
            return None

    def _size(self) -> int | None:
        with self._open("HEAD") as answer:
            length = answer.headers.get("Content-Length")
            return int(length) if length and length.isdecimal() else None

    def _fetch(self, part: Path) -> None:
        with self._open("GET") as answer, part.open("wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
            expected = answer.headers.get("Content-Length")
            if expected is not None and file.tell() != int(expected):
                raise _TemporaryFailure(f"it broke off after {file.tell()} of {expected} bytes")

    def _open(self, method: str) -> Any:
        request = urllib.request.Request(self._uri, method=method)  # noqa: S310 - http(s) by its caller
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310

    def _repeated(self, action: Callable[[], T]) -> T:
        retrying = Retrying(
            retry=retry_if_exception_type(_TemporaryFailure),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS),
            reraise=True,
        )
        try:
            return cast("T", retrying(self._sorted_out, action))
        except _TemporaryFailure as failure:
            raise UnavailableError(
                f"{self.shown} could not be fetched in {ATTEMPTS} attempts: {failure}. Look at the address and at the "
                f"way to it (https_proxy, firewall), or copy the file to S3 and name it there."
            ) from failure

    def _sorted_out(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except urllib.error.HTTPError as error:
            with error:
                if error.code >= 500 or error.code in _TEMPORARY:
                    raise _TemporaryFailure(f"the server answered {error.code} {error.reason}") from error
                raise DataError(
                    f"{self.shown} can't be fetched: the server answered {error.code} {error.reason}. "
                    f"Check the address."
                ) from error
        except urllib.error.URLError as error:
            raise _TemporaryFailure(str(error.reason)) from error
        except (http.client.HTTPException, OSError) as error:
            raise _TemporaryFailure(str(error) or type(error).__name__) from error
