"""Reading a metrics page: a server that is slow, endless or wrong costs a bounded time and amount of memory."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from topwork.clients.prometheus.scrape import MAX_PAGE_BYTES, read_page
from topwork.errors import SettingError, UnavailableError

HEADERS = b"HTTP/1.1 200 OK\r\n\r\n"
LINE = b"topwork_x 1\n"


@pytest.fixture
def serve() -> Iterator[Callable[[bytes, bytes, float], str]]:
    """Function that serves one response, which continues without end if `rest` is set, and returns its URL."""
    stop = threading.Event()

    def serve(start: bytes, rest: bytes = b"", pause_seconds: float = 0.0) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def respond() -> None:
            with listener, listener.accept()[0] as connection:
                connection.recv(65536)
                try:
                    connection.sendall(start)
                    while rest and not stop.wait(pause_seconds):
                        connection.sendall(rest)
                except OSError:  # the client has disconnected
                    pass

        threading.Thread(target=respond, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/metrics"

    yield serve
    stop.set()


def test_page_that_ends_with_its_connection(serve: Callable[..., str]) -> None:
    assert read_page(serve(HEADERS + LINE), 5.0).value("x") == 1


@pytest.mark.parametrize(
    ("start", "rest"),
    [(b"HTTP/1.1 200 OK\r\nX: ", b"x"), (HEADERS, LINE), (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", LINE)],
    ids=["headers", "body", "body with length"],
)
def test_response_that_arrives_byte_by_byte_times_out(serve: Callable[..., str], start: bytes, rest: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"/metrics does not answer \(timed out\)"):
        read_page(serve(start, rest, 0.05), 0.5)
    assert time.monotonic() - started < 3


def test_endless_page_is_not_read(serve: Callable[..., str]) -> None:
    with pytest.raises(SettingError, match=rf"more than {MAX_PAGE_BYTES >> 20} MiB, so it does not serve metrics"):
        read_page(serve(HEADERS, LINE * 10_000), 30.0)
