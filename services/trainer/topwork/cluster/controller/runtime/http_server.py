"""HTTP server of the controller: /metrics for Prometheus, /healthz and /readyz for the kubelet."""

import socket
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog

from topwork.errors import SettingError

log = structlog.get_logger(__name__)

Probe = Callable[[], Sequence[str]]
"""Returns what is wrong; nothing if the probe succeeds."""
Page = Callable[[], tuple[bytes, str]]
"""Returns a body and its content type."""
_Response = tuple[int, bytes, str]
# A client that sends nothing must not hold a thread for ever.
REQUEST_TIMEOUT_SECONDS = 10.0


class HttpServer:
    """Serves the pages in threads of its own, so that they respond while the rest of the process is busy.

    Args:
        port: TCP port; 0 selects a free port.
        metrics: The metrics page.
        health: Probe of /healthz: if it fails, the kubelet restarts the container.
        readiness: Probe of /readyz.

    Attributes:
        port: The port.

    Raises:
        SettingError: If the port is in use or not permitted.
    """

    def __init__(self, port: int, *, metrics: Page, health: Probe, readiness: Probe) -> None:
        pages = {
            "/metrics": lambda: (200, *metrics()),
            "/healthz": lambda: _probe(health),
            "/readyz": lambda: _probe(readiness),
        }
        self._server = _create_server(open_listener(port, "--http-port"), pages)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, name="http", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _probe(probe: Probe) -> _Response:
    problems = probe()
    return 503 if problems else 200, "".join(f"{line}\n" for line in problems or ["ok"]).encode(), "text/plain"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that disconnected
            log.exception("unexpected error of a page")


def _create_server(listener: socket.socket, pages: dict[str, Callable[[], _Response]]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_SECONDS

        def do_GET(self) -> None:
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(404)
                return
            status, body, content_type = page()
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: object) -> None:
            """Log no requests: probes and scrapes arrive every few seconds."""

    server = _Server(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket, server.server_address = listener, listener.getsockname()
    return server


def open_listener(port: int, option: str) -> socket.socket:
    """Listen on a port of all addresses, those of IPv6 included.

    Args:
        port: TCP port; 0 selects a free port.
        option: The option that sets it, for the message.

    Raises:
        SettingError: If the port is in use or not permitted.
    """
    dualstack = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dualstack else socket.AF_INET, dualstack_ipv6=dualstack, backlog=128
        )
    except OSError as error:
        raise SettingError(
            f"Cannot listen on {option} {port} ({error.strerror}). Choose another port, or 0 for a free one."
        ) from error
