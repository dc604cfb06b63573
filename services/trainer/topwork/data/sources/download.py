"""Files over http(s): what state they are in, and their download, with retries that go on where one broke off."""

import errno
import http.client
import re
import ssl
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from topwork.data.sources.http import answer_of
from topwork.errors import DataError, SettingError, UnavailableError

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 30.0

SLOW_SECONDS = 60.0
LEAST_BYTES = 256 * 2**10
"""Fewer bytes than this in `SLOW_SECONDS` are no download that ends: 4 KiB a second."""

MAX_SECONDS = 12 * 3600.0
"""All attempts together, half of the time that a job has by default: 4 TB at 100 MB a second."""

_CHUNK = 2**20
# Answers that another try may change (RFC 9110, RFC 6585); every other 4xx stays what it is.
_TEMPORARY = {408, 425, 429}
_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")

T = TypeVar("T")


class _TemporaryFailure(Exception):  # noqa: N818 - told as UnavailableError
    """What may go well the next time."""


class Download:
    """One file on a web server. The query of its address, which may be a signature, is never shown."""

    def __init__(self, uri: str, arrived: Callable[[], None] | None = None) -> None:
        """Name a file.

        Args:
            uri: Its address.
            arrived: Called with each piece that arrives.
        """
        parts = urlsplit(uri)
        self._uri, self._arrived = uri, arrived
        self._tag: str | None = None
        self.shown = urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))

    def state(self) -> str | None:
        """Say in which state the file is, from the headers of its answer.

        Returns:
            Text that changes when the file does; None where the server says nothing that would.

        Raises:
            DataError: If the server refuses the file, or leads to where none can be.
            SettingError: If it is on the open network without encryption, or its certificate is not trusted.
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
            DataError: If the server refuses the file, or leads to where none can be.
            SettingError: If it is on the open network without encryption, or its certificate is not trusted.
            UnavailableError: If it can't be reached, breaks off each time, or takes longer than `MAX_SECONDS`.
            OSError: If the disk is full.
        """
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        ends = time.monotonic() + MAX_SECONDS
        self._repeated(lambda: self._fetch(part, ends))
        part.replace(path)

    def _state(self) -> str | None:
        with answer_of(self._uri, self.shown, "HEAD", {}) as answer:
            length = answer.headers.get("Content-Length")
            if tag := answer.headers.get("ETag"):
                return f"{tag} {length}"
            if changed := answer.headers.get("Last-Modified"):
                return f"{self._uri} {changed} {length}"
            return None

    def _size(self) -> int | None:
        with answer_of(self._uri, self.shown, "HEAD", {}) as answer:
            length = answer.headers.get("Content-Length")
            return int(length) if length and length.isdecimal() else None

    def _fetch(self, part: Path, ends: float) -> None:
        got = part.stat().st_size if part.exists() and self._tag else 0
        headers = {"Range": f"bytes={got}-", "If-Range": self._tag} if got and self._tag else {}
        with answer_of(self._uri, self.shown, "GET", headers) as answer:
            begins = _beginning(answer)
            if begins not in (0, got):
                raise _TemporaryFailure(f"it was asked to go on at byte {got}, and went on at {begins}")
            self._tag = _tag_of(answer)
            expected = answer.headers.get("Content-Length")
            with part.open("ab" if begins else "wb") as file:
                count = self._copy(answer, file, ends)
            if expected is not None and count != int(expected):
                raise _TemporaryFailure(f"it broke off after {begins + count} of {begins + int(expected)} bytes")

    def _copy(self, answer: Any, file: IO[bytes], ends: float) -> int:
        """Write what arrives, as long as it arrives in time; says how many bytes."""
        count, counted, since = 0, 0, time.monotonic()
        # Not read(), which waits for a whole chunk however slowly it comes.
        while chunk := answer.read1(_CHUNK):
            file.write(chunk)
            if self._arrived:
                self._arrived()
            count += len(chunk)
            now = time.monotonic()
            if now > ends:
                raise UnavailableError(
                    f"{self.shown} is not fetched after {MAX_SECONDS / 3600:g} hours. Copy the file to S3 and name it "
                    "there."
                )
            if now - since > SLOW_SECONDS:
                if count - counted < LEAST_BYTES:
                    raise _TemporaryFailure(f"{count - counted} bytes came in {now - since:.0f} seconds")
                counted, since = count, now
        return count

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
                if error.code == 416:
                    # The file is no longer as long as what is there of it: from the start, then.
                    self._tag = None
                    raise _TemporaryFailure("it changed while it was fetched") from error
                if error.code >= 500 or error.code in _TEMPORARY:
                    raise _TemporaryFailure(f"the server answered {error.code} {error.reason}") from error
                raise DataError(
                    f"{self.shown} can't be fetched: the server answered {error.code} {error.reason}. "
                    f"Check the address."
                ) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise SettingError(
                    f"{self.shown} can't be fetched: the certificate of the server is not trusted "
                    f"({error.reason.verify_message}). For an authority of your own set spec.compute.extraCA, or on "
                    "this machine SSL_CERT_FILE."
                ) from error
            raise _TemporaryFailure(str(error.reason)) from error
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in _ROOM:
                raise
            raise _TemporaryFailure(str(error) or type(error).__name__) from error


def _beginning(answer: Any) -> int:
    """Say at which byte of the file an answer begins."""
    if answer.status != http.client.PARTIAL_CONTENT:
        return 0
    found = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
    return int(found[1]) if found else -1


def _tag_of(answer: Any) -> str | None:
    """Give what names this very content to the server (RFC 9110, 13.1.5); None where there is no such thing."""
    tag = answer.headers.get("ETag")
    found = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified")
    return str(found) if found else None
