"""HTTP(S) requests to untrusted servers: address checks, redirects and time limits on top of urllib3.

Three parts are custom because urllib3 has no equivalent:

- Redirects. urllib3 reads the body of every redirect into memory, regardless of its size, and has no hook that checks
  the next address.
- The check of the peer address. It runs on the connected socket, before any data is sent, so that a name cannot resolve
  to one address for the check and to another for the connection (DNS rebinding).
- The deadline for response headers. Every byte that arrives restarts the read timeout of urllib3, so a server that
  trickles its headers would never time out.
"""

import base64
import http.client
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urljoin
from urllib.request import getproxies, proxy_bypass

from urllib3 import BaseHTTPResponse, PoolManager, ProxyManager, Timeout
from urllib3.exceptions import HTTPError, ProxyError, ProxySchemeUnknown
from urllib3.util import Url, parse_url

from topwork import __version__
from topwork.clients.url_policy import check_plain_http, is_forbidden_host
from topwork.errors import DataError, SettingError

HEADERS_TIMEOUT_SECONDS = 120.0
"""From the start of a request to the end of the response headers, redirects included."""

MAX_REDIRECTS = 10

USER_AGENT = f"topwork/{__version__} (compatible; Mozilla/5.0)"
"""Many hosts reject the default of Python's HTTP clients, and some reject everything without `Mozilla`."""

SOCKET_TIMEOUT_SECONDS = 60.0
"""To establish a connection, and between two reads."""

# Responses that may change on another attempt (RFC 9110, RFC 6585). 416: the file is now shorter than the part that
# was downloaded before. All other 4xx are final.
_RETRIED_STATUSES = frozenset({408, 416, 425, 429})

# Its warning about malformed response headers contains the full URL.
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)


class StatusError(DataError):
    """The server rejected a request, and would do so again.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TransientError(Exception):
    """A request failed, but another attempt may succeed.

    Attributes:
        response: The response of the server, closed, if it caused the failure.
    """

    def __init__(self, message: str, response: BaseHTTPResponse | None = None) -> None:
        super().__init__(message)
        self.response = response


@contextmanager
def open_url(
    method: str, url: str, display_url: str, headers: Mapping[str, str] | None = None
) -> Iterator[BaseHTTPResponse]:
    """Send a request, follow redirects and return the successful response; its body is not read yet.

    Proxies come from the environment (`https_proxy`, `http_proxy`, `no_proxy`), trusted certificate authorities from
    the system or `SSL_CERT_FILE`.

    Args:
        method: GET or HEAD.
        url: URL to request.
        display_url: The URL as it appears in error messages, without secrets.
        headers: Request headers.

    Yields:
        The response, with a 2xx status. It is closed when the block ends. urllib3 errors that the block raises are
        translated as well.

    Raises:
        StatusError: If the server rejects the request.
        DataError: If the URL or a redirect points to a forbidden address.
        SettingError: If the certificate is not trusted, or a hop uses plain HTTP on a public network.
        TransientError: If the request fails in any other way.
    """
    with _translate_errors(display_url), ExitStack() as connections:
        with _headers_deadline() as watch:
            request = _Request(method, url, display_url, {"User-Agent": USER_AGENT, **(headers or {})})
            response = _follow_redirects(request, watch, connections)
        _check_status(response, display_url)
        yield response


@dataclass(frozen=True)
class _Request:
    method: str
    url: str
    display_url: str
    headers: dict[str, str]


def _follow_redirects(
    request: _Request, watch: Callable[[socket.socket], None], connections: ExitStack
) -> BaseHTTPResponse:
    """Return the first response that is not a redirect. `connections` closes all responses and connections."""

    def on_connect(sock: socket.socket, *, is_proxy: bool) -> None:
        watch(sock)
        # A proxy resolves names itself and applies its own policy.
        if not is_proxy:
            _check_host(str(sock.getpeername()[0]), request.display_url)

    target = _parse_and_check(request.url, request.display_url)
    for _ in range(MAX_REDIRECTS + 1):
        response = connections.enter_context(closing(_send(request, target, on_connect, connections)))
        location = response.get_redirect_location()
        if not location:
            return response
        response.close()  # without reading the body, which may be endless
        target = _redirect_target(target, location, request.display_url)
    raise DataError(f"{request.display_url} redirects more than {MAX_REDIRECTS} times.")


def _send(request: _Request, target: Url, on_connect: Callable[..., None], connections: ExitStack) -> BaseHTTPResponse:
    manager = _pool_manager(target)
    pool = connections.enter_context(manager.connection_from_url(target.url))
    pool.ConnectionCls = _watched_connection(pool.ConnectionCls, on_connect)
    return manager.urlopen(
        request.method,
        target.url,
        redirect=False,
        headers=request.headers,
        retries=False,
        preload_content=False,
        enforce_content_length=False,
    )


def _redirect_target(current: Url, location: str, display_url: str) -> Url:
    target = _parse_and_check(location, display_url, base=current.url)
    if current.scheme == "https" and target.scheme != "https":
        raise DataError(
            f"{display_url} redirects from https to plain http ({target.host}), where others could change the "
            "content. Use an address that stays on https, or copy the file to S3."
        )
    return target


def _parse_and_check(url: str, display_url: str, base: str = "") -> Url:
    """Parse a URL, or a redirect relative to `base`, and reject it if no dataset can be there.

    urllib3 parses it for the checks and for the connection: two parsers could disagree about the host.
    """
    try:
        target = parse_url(urljoin(base, url))
    except ValueError as error:
        raise DataError(f"{display_url} points to an address that is not a valid URL.") from error
    if target.scheme not in ("http", "https"):
        raise DataError(f"{display_url} points to a {target.scheme}: URL. Only http and https are supported.")
    if not target.host:
        raise DataError(f"{display_url} points to a URL without a host.")
    _check_host(target.host.strip("[]"), display_url)
    check_plain_http(f"{target.scheme}://{target.host}", display_url)
    # A forwarding proxy would receive the credentials of the URL.
    return target._replace(auth=None, fragment=None)


def _check_host(host: str, display_url: str) -> None:
    if is_forbidden_host(host):
        raise DataError(
            f"{display_url} points to {host}, a link-local address or a cloud metadata service. Such hosts hand out "
            "credentials and never serve datasets. Correct the address."
        )


def _pool_manager(url: Url) -> PoolManager:
    """Return a direct connection manager, or one for the proxy that the environment sets for the URL."""
    timeout = Timeout(connect=SOCKET_TIMEOUT_SECONDS, read=SOCKET_TIMEOUT_SECONDS)
    proxy = None if proxy_bypass(url.netloc or "") else getproxies().get(url.scheme or "")
    if not proxy:
        return PoolManager(timeout=timeout)
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    headers = {}
    if auth := parse_url(proxy).auth:
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(unquote(auth).encode()).decode()}"
    return ProxyManager(proxy, proxy_headers=headers, timeout=timeout)


def _watched_connection(connection_class: Any, on_connect: Callable[..., None]) -> Any:
    """Derive a connection class that calls `on_connect` with each new socket, before any data is sent."""

    class WatchedConnection(connection_class):
        def _new_conn(self) -> socket.socket:
            sock: socket.socket = super()._new_conn()
            try:
                on_connect(sock, is_proxy=self.proxy is not None)
            except BaseException:
                sock.close()
                raise
            return sock

        def getresponse(self) -> Any:
            responses: list[http.client.HTTPResponse] = []

            def open_response(*arguments: Any, **keywords: Any) -> http.client.HTTPResponse:
                responses.append(http.client.HTTPResponse(*arguments, **keywords))
                return responses[-1]

            self.response_class = open_response
            try:
                return super().getresponse()
            except BaseException:
                # Invalid headers: urllib3 closes the connection, but not its file.
                for response in responses:
                    response.close()
                raise

    return WatchedConnection


@contextmanager
def _headers_deadline() -> Iterator[Callable[[socket.socket], None]]:
    """Shut down the sockets that were passed to the yielded function if the block takes too long."""
    sockets: list[socket.socket] = []
    expired = threading.Event()

    def shut_down() -> None:
        expired.set()
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def watch(sock: socket.socket) -> None:
        # A duplicate: a TLS handshake takes the descriptor away from the original socket.
        sockets.append(sock.dup())
        if expired.is_set():
            shut_down()

    timer = threading.Timer(HEADERS_TIMEOUT_SECONDS, shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield watch
    except HTTPError:
        if not expired.is_set():
            raise
    finally:
        timer.cancel()
        for sock in sockets:
            sock.close()
    # http.client treats headers that were cut off as complete, so there may be no error.
    if expired.is_set():
        raise TransientError(f"the response headers did not arrive within {HEADERS_TIMEOUT_SECONDS:g} seconds")


def _check_status(response: BaseHTTPResponse, display_url: str) -> None:
    if 200 <= response.status < 300:
        return
    status = f"{response.status} {response.reason or ''}".rstrip()
    if response.status >= 500 or response.status in _RETRIED_STATUSES:
        raise TransientError(f"the server responded with {status}", response)
    raise StatusError(
        f"{display_url} cannot be downloaded: the server responded with {status}. Check the address; if it needs a "
        "login, download the file and copy it to S3.",
        response.status,
    )


@contextmanager
def _translate_errors(display_url: str) -> Iterator[None]:
    """Translate urllib3 errors. Their own messages may contain the full URL, so only the root cause is shown."""
    try:
        yield
    except ProxySchemeUnknown as error:
        raise SettingError(
            f"{display_url} cannot be downloaded: the proxy of the environment (https_proxy, http_proxy) has an "
            "unsupported scheme. Expected http://host:port or https://host:port."
        ) from error
    except HTTPError as error:
        cause = _root_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise SettingError(
                f"{display_url} cannot be downloaded: the certificate of the server is not trusted "
                f"({cause.verify_message}). For a private certificate authority, set spec.compute.extraCA, or "
                "SSL_CERT_FILE on this machine."
            ) from error
        prefix = "proxy: " if isinstance(error, ProxyError) else ""
        raise TransientError(f"{prefix}{str(cause) or type(cause).__name__}") from error


def _root_cause(error: BaseException) -> BaseException:
    while isinstance(error, HTTPError) and (cause := error.__cause__ or error.__context__):
        error = cause
    return error
