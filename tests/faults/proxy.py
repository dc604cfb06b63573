"""An HTTP proxy in front of the real S3 server that plays one fault: which requests it hits, and from which on."""

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

EVER = 1 << 30
# How long a port stays closed that refuses connections once.
CLOSED_SECONDS = 0.6
ACCEPT_SECONDS = 0.05
# How long a client waits for what is silent, and for all else: a busy machine answers late, and is not silent.
SILENT_SECONDS = 1.0
BUSY_SECONDS = 60.0
# Requests of a client at most while a fault lasts for ever, so that it ends soon.
ATTEMPTS = 2


@dataclass(frozen=True)
class Answer:
    """What the server says."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


@dataclass(frozen=True)
class Request:
    """A request as it arrived: `path` begins with the bucket."""

    method: str
    path: str
    headers: HTTPMessage
    body: bytes

    @property
    def is_object(self) -> bool:
        """Whether it is about one object, not about a bucket."""
        return urlsplit(self.path).path.strip("/").count("/") > 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        name: What the table calls it.
        play: Spoils one request.
        hits: Which requests it can hit.
        first: The first one of those that it hits, counted from 0.
        times: How many it hits.
        is_silent: Whether a client learns of it by waiting alone.
    """

    name: str
    play: "Callable[[Exchange], None]"
    hits: Callable[[Request], bool] = lambda _: True
    first: int = 0
    times: int = EVER
    is_silent: bool = False

    def once(self, first: int = 0) -> "Fault":
        return replace(self, first=first, times=1)

    def always(self, first: int = 0) -> "Fault":
        return replace(self, first=first, times=EVER)


class Proxy(ThreadingHTTPServer):
    """Carries requests to the server, and spoils those that its fault hits."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self._upstream = (urlsplit(endpoint).hostname, urlsplit(endpoint).port)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.ended = threading.Event()
        self.fault: Fault | None = None
        self.seen: list[Request] = []
        self.hits = 0
        self._counted = 0
        self._lock = threading.Lock()
        self._open = True
        self.socket.settimeout(ACCEPT_SECONDS)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is none of the proxy's business."""

    def serve(self) -> None:
        """Take connections until the end; the port may close and open meanwhile."""
        while not self.ended.is_set():
            try:
                connection, address = self.socket.accept()
            except OSError:  # nobody came, or the port is closed
                self.ended.wait(0.01)
            else:
                connection.settimeout(None)
                self.process_request(connection, address)

    def play(self, fault: Fault | None) -> None:
        """Let a fault begin; None ends the one before."""
        with self._lock:
            self.fault, self.seen, self.hits, self._counted = fault, [], 0, 0
        self.open_port()

    def settings(self, settings: StorageSettings) -> StorageSettings:
        """Give the settings of a client behind the proxy that does not wait long for the end of its fault."""
        seconds = SILENT_SECONDS if self.fault and self.fault.is_silent else BUSY_SECONDS
        attempts = ATTEMPTS if self.fault and self.fault.times == EVER else settings.attempts
        return replace(
            settings,
            endpoint_url=self.endpoint,
            attempts=attempts,
            connect_timeout_seconds=seconds,
            read_timeout_seconds=seconds,
        )

    def close_port(self) -> None:
        """Refuse connections from now on."""
        with self._lock:
            if self._open:
                self._open = False
                self.socket.shutdown(socket.SHUT_RDWR)
                self.socket.close()

    def open_port(self) -> None:
        """Take connections again, at the same port."""
        with self._lock:
            if not self._open:
                self.socket = socket.create_server(self.server_address, backlog=self.request_queue_size)
                self.socket.settimeout(ACCEPT_SECONDS)
                self._open = True

    def struck(self, request: Request) -> Fault | None:
        """Count a request, and give the fault that hits it."""
        with self._lock:
            self.seen.append(request)
            fault = self.fault
            if fault is None or not fault.hits(request):
                return None
            number, self._counted = self._counted, self._counted + 1
            if not fault.first <= number < fault.first + fault.times:
                return None
            self.hits += 1
            return fault

    def forwarded(self, request: Request) -> Answer:
        """Ask the server."""
        upstream = HTTPConnection(*self._upstream, timeout=60)
        try:
            upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    upstream.putheader(name, value)
            upstream.endheaders(request.body)
            answer = upstream.getresponse()
            return Answer(answer.status, answer.getheaders(), answer.read())
        finally:
            upstream.close()


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"
    server: Proxy
    # Small answers are not held back until more comes.
    wbufsize = 1 << 16

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def handle_expect_100(self) -> bool:
        """Let the body come; a held-back answer would hold it up."""
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.request_seen = Request(self.command, self.path, self.headers, body)
        fault = self.server.struck(self.request_seen)
        with suppress(OSError, HTTPException):
            if fault:
                fault.play(self)
            else:
                self.tell(self.server.forwarded(self.request_seen))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = exchange

    def tell(self, answer: Answer, *, body: bytes | None = None) -> None:
        """Send an answer; `body` replaces its body, of which the head still tells the true length."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        stated = {name.lower(): value for name, value in answer.headers}.get("content-length")
        self.send_header("Content-Length", str(stated if self.command == "HEAD" and stated else len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if body is None else body)
        self.wfile.flush()

    def hang_up(self, *, reset: bool = False) -> None:
        """Close the connection; with a reset, what was sent may be lost, too."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # shutdown() of the server would end it in an orderly way.
            self.connection.close()
        else:
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


def error(status: int, code: str, message: str) -> Callable[[Exchange], None]:
    """An answer as S3 words its errors; the request never reaches the server."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()

    def play(exchange: Exchange) -> None:
        exchange.tell(Answer(status, [("Content-Type", "application/xml")], body))

    return play


def reset(exchange: Exchange) -> None:
    """The connection ends in the middle of nowhere; the request never reaches the server."""
    exchange.hang_up(reset=True)


def lost_answer(exchange: Exchange) -> None:
    """The request reaches the server, and its answer is lost."""
    exchange.server.forwarded(exchange.request_seen)
    exchange.hang_up(reset=True)


def stall(exchange: Exchange) -> None:
    """Nothing comes, ever."""
    exchange.server.ended.wait()
    exchange.hang_up()


def stalled_body(exchange: Exchange) -> None:
    """The answer begins and nothing more comes, ever."""
    answer = exchange.server.forwarded(exchange.request_seen)
    exchange.tell(answer, body=answer.body[: len(answer.body) // 2])
    stall(exchange)


def trickle(exchange: Exchange) -> None:
    """The answer comes byte by byte, so that no wait for the next byte is ever long."""
    answer = exchange.server.forwarded(exchange.request_seen)
    exchange.tell(answer, body=b"")
    for byte in answer.body:
        if exchange.server.ended.wait(0.1):
            break
        exchange.wfile.write(bytes([byte]))
        exchange.wfile.flush()


def truncate(exchange: Exchange) -> None:
    """Half of the answer, then the end of the connection."""
    answer = exchange.server.forwarded(exchange.request_seen)
    exchange.tell(answer, body=answer.body[: len(answer.body) // 2])
    exchange.hang_up()


def corrupt_answer(exchange: Exchange) -> None:
    """One bit of the body of the answer is another."""
    answer = exchange.server.forwarded(exchange.request_seen)
    exchange.tell(answer, body=_with_another_bit(answer.body))


def corrupt_request(exchange: Exchange) -> None:
    """One bit of the body of the request is another when it reaches the server."""
    request = exchange.request_seen
    exchange.tell(exchange.server.forwarded(replace(request, body=_with_another_bit(request.body))))


def _with_another_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body


@contextmanager
def proxy_before(endpoint: str) -> Iterator[Proxy]:
    """Run a proxy before a server for as long as the block runs."""
    with Proxy(endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.ended.set()
            thread.join()


def refuse(exchange: Exchange) -> None:
    """The port is closed: at once where the fault is hit, and for as long as it lasts."""
    server, fault = exchange.server, exchange.server.fault
    exchange.hang_up(reset=True)
    if fault and fault.times == 1:
        server.close_port()
        time.sleep(CLOSED_SECONDS)
        server.open_port()
    else:
        server.close_port()
