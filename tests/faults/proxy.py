"""An HTTP proxy in front of the real S3 server that injects a fault into selected requests."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from topwork.clients.s3.storage import StorageSettings

FOREVER = 1 << 30
# Time for which the port stays closed when a single request is refused.
CLOSED_SECONDS = 0.6
ACCEPT_SECONDS = 0.05
# Client timeouts for silent faults, and for all others, because responses can be slow on a busy machine.
SILENT_TIMEOUT_SECONDS = 1.0
TIMEOUT_SECONDS = 60.0
# Maximum number of attempts of a client during a permanent fault, so that it fails quickly.
ATTEMPTS = 2


@dataclass(frozen=True)
class Response:
    """A response of the server."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class Request:
    """A received request; `path` begins with the bucket."""

    method: str
    path: str
    headers: HTTPMessage
    body: bytes

    @property
    def is_object(self) -> bool:
        """Whether the request is for an object, not for a bucket."""
        return urlsplit(self.path).path.strip("/").count("/") > 0


@dataclass(frozen=True)
class Fault:
    """A fault and the requests that it affects.

    Attributes:
        name: Name in test IDs and in the printed table.
        inject: Handles an affected request.
        matches: Selects the requests that can be affected.
        first: Index of the first affected request among those that match.
        times: Number of affected requests.
        is_silent: Whether a client can detect the fault only by a timeout.
    """

    name: str
    inject: "Callable[[Exchange], None]"
    matches: Callable[[Request], bool] = lambda _: True
    first: int = 0
    times: int = FOREVER
    is_silent: bool = False

    def once(self, first: int = 0) -> "Fault":
        return replace(self, first=first, times=1)

    def always(self, first: int = 0) -> "Fault":
        return replace(self, first=first, times=FOREVER)


class Proxy(ThreadingHTTPServer):
    """Forwards requests to the server, and injects a fault into selected ones."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self._upstream = (urlsplit(endpoint).hostname, urlsplit(endpoint).port)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.stopped = threading.Event()
        self.fault: Fault | None = None
        self.requests: list[Request] = []
        self.fault_count = 0
        self._matching_count = 0
        self._lock = threading.Lock()
        self._open = True
        self.socket.settimeout(ACCEPT_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that close their connection."""

    def serve(self) -> None:
        """Accept connections until stopped; the port can be closed and reopened in between."""
        while not self.stopped.is_set():
            try:
                connection, address = self.socket.accept()
            except OSError:  # no connection, or the port is closed
                self.stopped.wait(0.01)
            else:
                connection.settimeout(None)
                self.process_request(connection, address)

    def set_fault(self, fault: Fault | None) -> None:
        """Start injecting a fault and reset the counts; None stops injecting."""
        with self._lock:
            self.fault, self.requests, self.fault_count, self._matching_count = fault, [], 0, 0
        self.open_port()

    def settings(self, settings: StorageSettings) -> StorageSettings:
        """Return settings of a client behind the proxy that fails quickly during the current fault."""
        seconds = SILENT_TIMEOUT_SECONDS if self.fault and self.fault.is_silent else TIMEOUT_SECONDS
        attempts = ATTEMPTS if self.fault and self.fault.times == FOREVER else settings.attempts
        return replace(
            settings,
            endpoint_url=self.endpoint,
            attempts=attempts,
            connect_timeout_seconds=seconds,
            read_timeout_seconds=seconds,
        )

    def close_port(self) -> None:
        """Start refusing connections."""
        with self._lock:
            if self._open:
                self._open = False
                self.socket.shutdown(socket.SHUT_RDWR)
                self.socket.close()

    def open_port(self) -> None:
        """Accept connections again at the same port."""
        with self._lock:
            if not self._open:
                self.socket = socket.create_server(self.server_address, backlog=self.request_queue_size)
                self.socket.settimeout(ACCEPT_SECONDS)
                self._open = True

    def next_fault(self, request: Request) -> Fault | None:
        """Count a request, and return the fault to inject into it, if any."""
        with self._lock:
            self.requests.append(request)
            fault = self.fault
            if fault is None or not fault.matches(request):
                return None
            index, self._matching_count = self._matching_count, self._matching_count + 1
            if not fault.first <= index < fault.first + fault.times:
                return None
            self.fault_count += 1
            return fault

    def forward(self, request: Request) -> Response:
        """Send a request to the server and return its response."""
        upstream = HTTPConnection(*self._upstream, timeout=60)
        try:
            upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    upstream.putheader(name, value)
            upstream.endheaders(request.body)
            response = upstream.getresponse()
            return Response(response.status, response.getheaders(), response.read())
        finally:
            upstream.close()


class Exchange(BaseHTTPRequestHandler):
    """A request and its response."""

    protocol_version = "HTTP/1.1"
    server: Proxy
    # Buffered, so that a small response is sent in one write.
    wbufsize = 1 << 16

    def log_message(self, *_: Any) -> None:
        """Write no access log."""

    def handle_expect_100(self) -> bool:
        """Flush the response 100 Continue, for which the client waits before it sends the body."""
        is_accepted = super().handle_expect_100()
        self.wfile.flush()
        return is_accepted

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.request_received = Request(self.command, self.path, self.headers, body)
        fault = self.server.next_fault(self.request_received)
        with suppress(OSError, HTTPException):
            if fault:
                fault.inject(self)
            else:
                self.respond(self.server.forward(self.request_received))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

    def respond(self, response: Response, *, body: bytes | None = None) -> None:
        """Send a response. `body` replaces its body, but the Content-Length header keeps the original length."""
        self.send_response_only(response.status)
        for name, value in response.headers:
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        length = {name.lower(): value for name, value in response.headers}.get("content-length")
        self.send_header("Content-Length", str(length if self.command == "HEAD" and length else len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body if body is None else body)
        self.wfile.flush()

    def disconnect(self, *, reset: bool = False) -> None:
        """Close the connection. With a reset, data that was already sent can be lost too."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # shutdown() of the server would close it without a reset.
            self.connection.close()
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


def error(status: int, code: str, message: str) -> Callable[[Exchange], None]:
    """Return a handler that responds with an S3 error; the request does not reach the server."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def inject(exchange: Exchange) -> None:
        exchange.respond(Response(status, [("Content-Type", "application/xml")], body))

    return inject


def reset(exchange: Exchange) -> None:
    """Reset the connection; the request does not reach the server."""
    exchange.disconnect(reset=True)


def lost_response(exchange: Exchange) -> None:
    """Forward the request, but reset the connection instead of responding."""
    exchange.server.forward(exchange.request_received)
    exchange.disconnect(reset=True)


def stall(exchange: Exchange) -> None:
    """Never respond."""
    exchange.server.stopped.wait()
    exchange.disconnect()


def stalled_body(exchange: Exchange) -> None:
    """Send half of the response body, then stall."""
    response = exchange.server.forward(exchange.request_received)
    exchange.respond(response, body=response.body[: len(response.body) // 2])
    stall(exchange)


def slow_body(exchange: Exchange) -> None:
    """Send the response body slowly, byte by byte. The time between two bytes is below every read timeout."""
    response = exchange.server.forward(exchange.request_received)
    exchange.respond(response, body=b"")
    for byte in response.body:
        if exchange.server.stopped.wait(0.1):
            break
        exchange.wfile.write(bytes([byte]))
        exchange.wfile.flush()


def truncate(exchange: Exchange) -> None:
    """Send half of the response body, then close the connection."""
    response = exchange.server.forward(exchange.request_received)
    exchange.respond(response, body=response.body[: len(response.body) // 2])
    exchange.disconnect()


def corrupt_response(exchange: Exchange) -> None:
    """Flip one bit of the response body."""
    response = exchange.server.forward(exchange.request_received)
    exchange.respond(response, body=_flip_bit(response.body))


def corrupt_request(exchange: Exchange) -> None:
    """Flip one bit of the request body."""
    request = exchange.request_received
    exchange.respond(exchange.server.forward(replace(request, body=_flip_bit(request.body))))


def _flip_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


@contextmanager
def run_proxy(endpoint: str) -> Iterator[Proxy]:
    """Run a proxy in front of a server while the block runs."""
    with Proxy(endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.stopped.set()
            thread.join()


def refuse(exchange: Exchange) -> None:
    """Close the connection and the port: briefly if the fault occurs once, otherwise until the fault is removed."""
    server, fault = exchange.server, exchange.server.fault
    exchange.disconnect(reset=True)
    if fault and fault.times == 1:
        server.close_port()
        time.sleep(CLOSED_SECONDS)
        server.open_port()
    else:
        server.close_port()
