"""One answer over http(s) from a server that may be hostile: where it may lead, and how long it may take."""

import http.client
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

from topwork.clients.url_policy import check_plain_http, is_forbidden
from topwork.errors import DataError

ANSWER_SECONDS = 120.0
"""From the first byte that is sent to the last of the answer's head."""

MAX_REDIRECTS = 10
"""Addresses that one request is led on to."""

SILENCE_SECONDS = 60.0
"""Wait for a connection, and for the next bytes."""


def check_address(uri: str, shown: str) -> None:
    """Refuse an address that no data set has.

    Args:
        uri: Where a request would go.
        shown: How the address that the user gave is shown.

    Raises:
        DataError: If it is not http(s), or the host is link-local or a metadata service.
        SettingError: If it is plain HTTP to the open network, and that is not allowed.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        raise DataError(f"{shown} leads to an address of the kind {parts.scheme}:. Only http and https are followed.")
    _check_host(parts.hostname or "", shown)
    check_plain_http(uri, shown)


def _check_host(host: str, shown: str) -> None:
    if is_forbidden(host):
        raise DataError(
            f"{shown} leads to {host}, a link-local address or the metadata service of a cloud, which hands out "
            "credentials and holds no data set. Correct the address."
        )


@contextmanager
def answer_of(uri: str, shown: str, method: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Send a request, follow where it leads and give the answer.

    The proxy of the environment is used. A certificate that is not trusted, and a step down from https to http, end in
    an error.

    Args:
        uri: Address.
        shown: How it is shown.
        method: GET or HEAD.
        headers: Headers of the request.

    Yields:
        The answer of `http.client`, with the head read.

    Raises:
        DataError: If it leads to where no data set is.
        SettingError: If it leads to plain HTTP on the open network.
        OSError: If the request fails, `urllib.error.URLError` among them.
    """
    check_address(uri, shown)
    watch = _Watch()
    opener = urllib.request.OpenerDirector()
    # build_opener would add those for ftp:, file: and data:.
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Plain(watch, shown),
        _Encrypted(watch, shown),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(shown),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(uri, method=method, headers=dict(headers))  # noqa: S310 - checked above
    with watch:
        answer = opener.open(request, timeout=SILENCE_SECONDS)
    with answer:
        if watch.has_cut:
            # http.client takes a head that was cut for a whole one.
            raise TimeoutError(f"its answer did not begin in {ANSWER_SECONDS:g} seconds")
        yield answer


class _Watch:
    """Cuts a connection whose answer has not begun in time: a head that trickles resets every other limit."""

    def __init__(self) -> None:
        self.has_cut = False
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> None:
        self._timer = threading.Timer(ANSWER_SECONDS, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()

    def add(self, connection: socket.socket) -> None:
        """Watch one more connection."""
        self._sockets.append(connection)

    def _cut(self) -> None:
        self.has_cut = True
        for connection in self._sockets:
            with suppress(OSError):
                # Not the shutdown of an SSLSocket, which takes its encryption away while another thread reads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _watched(
    kind: type[http.client.HTTPConnection], watch: _Watch, shown: str, *, direct: bool
) -> type[http.client.HTTPConnection]:
    """Give a connection that looks at whom a name led to, before anything is sent; a proxy looks at that itself."""

    class Connection(kind):  # type: ignore[valid-type, misc]
        def connect(self) -> None:
            super().connect()
            watch.add(self.sock)
            if direct:
                try:
                    _check_host(str(self.sock.getpeername()[0]), shown)
                except DataError:
                    self.close()
                    raise

    return Connection


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch, shown: str) -> None:
        super().__init__()
        self._watch, self._shown = watch, shown

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        direct = not req.has_proxy()
        return self.do_open(_watched(http.client.HTTPConnection, self._watch, self._shown, direct=direct), req)


class _Encrypted(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch, shown: str) -> None:
        # The usual authorities, or those of SSL_CERT_FILE; names are checked.
        super().__init__()
        self._watch, self._shown = watch, shown

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        direct = not getattr(req, "_tunnel_host", None)
        return self.do_open(_watched(http.client.HTTPSConnection, self._watch, self._shown, direct=direct), req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http(s) only, and never from https to http."""

    def __init__(self, shown: str) -> None:
        self._shown = shown
        self._followed = 0

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        # Its body is left unread: it could be without end.
        fp.close()
        target = urljoin(req.full_url, headers.get("location") or "")
        self._check(req.full_url, target)
        self._followed += 1
        if self._followed > MAX_REDIRECTS:
            raise DataError(f"{self._shown} leads from one address to the next, {MAX_REDIRECTS} times and on.")
        further = urllib.request.Request(target, method=req.get_method(), headers=req.headers)  # noqa: S310 - checked
        return self.parent.open(further, timeout=req.timeout)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def _check(self, before: str, target: str) -> None:
        check_address(target, self._shown)
        if before.startswith("https:") and not target.startswith("https:"):
            raise DataError(
                f"{self._shown} leads from https to plain http ({urlsplit(target).hostname}), where what arrives could "
                "be changed. Name an address that stays encrypted, or copy the file to S3."
            )
