"""HTTP connections of the API server used in tests: responses, streams, and injected connection faults."""

import contextlib
import json
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from api_kinds import Object
from api_statuses import Fault

if TYPE_CHECKING:
    from api_server import ApiServer, Request

TRUE = {"1", "true", "True"}


class ConnectionCutError(Exception):
    """An injected fault closes the connection here."""


class ConnectionHandler(BaseHTTPRequestHandler):
    """A connection to the server.

    Attributes:
        fault: Fault of the current request.
        record: The current request, as recorded for tests.
        sent: Bytes of the stream sent so far.
        query: Query parameters of the current request.
        body: Body of the current request.
    """

    fault: Fault
    record: "Request"
    sent: int
    query: dict[str, str]
    body: Any
    protocol_version = "HTTP/1.1"
    timeout = 60
    # Headers and body are sent separately. With Nagle's algorithm, the body waits 40 ms for the client's delayed ACK.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        if hasattr(self.request, "do_handshake"):
            self.request.do_handshake()  # in the thread of the connection, so that a slow client does not block others
        super().setup()

    def handle(self) -> None:
        with contextlib.suppress(OSError, ConnectionCutError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        """Write no access log."""

    @property
    def api(self) -> "ApiServer":
        return self.server.api  # type: ignore[attr-defined, no-any-return]

    def _send_json(
        self, code: int, content: Object, headers: dict[str, str] | None = None, warnings: list[str] | None = None
    ) -> None:
        headers = {"Content-Type": "application/json"} | (headers or {})
        self._send_bytes(code, json.dumps(content).encode(), headers, warnings)

    def _send_bytes(self, code: int, data: bytes, headers: dict[str, str], warnings: list[str] | None = None) -> None:
        self.record.code = code
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        for text in warnings or ():
            self.send_header("Warning", f'299 - "{text}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self._write(data)

    def _begin_stream(self, content_type: str) -> None:
        self.record.code = 200
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()

    def _send_chunk(self, data: bytes) -> None:
        cut = self.fault.cut_after_bytes
        cut = cut if cut is not None else self.fault.stall_after_bytes
        if cut is not None and self.sent + len(data) > cut:
            part = data[: cut - self.sent]
            if part:
                self._write_chunk(part)
            self._break_connection()
        self._write_chunk(data)
        self.sent += len(data)

    def _write_chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _end_stream(self) -> None:
        if self.fault.cut_after_bytes is not None or self.fault.stall_after_bytes is not None:
            self._break_connection()
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _write(self, data: bytes) -> None:
        if self.fault.cut_after_bytes is not None and self.fault.cut_after_bytes < len(data):
            self.wfile.write(data[: self.fault.cut_after_bytes])
            self._break_connection()
        self.wfile.write(data)
        self.wfile.flush()

    def _break_connection(self) -> None:
        """Close the connection in the middle of a response, or leave it open and silent."""
        self.wfile.flush()
        while self.fault.stall_after_bytes is not None and not self.api.is_closing and not self._is_client_gone():
            time.sleep(0.02)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionCutError

    def _is_client_gone(self) -> bool:
        """Return whether the client has closed the connection."""
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except (BlockingIOError, ValueError):  # nothing to read, or TLS, which does not support MSG_PEEK
            return False
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                self.connection.settimeout(self.timeout)
