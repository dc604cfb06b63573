"""Errors of a Pushgateway: unreachable, slow or not a Pushgateway. tests/monitoring uses a real one."""

import http.server
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from typer.testing import CliRunner

from topwork.cli import app
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.prometheus.pushgateway import delete_outcome, push_outcome
from topwork.errors import SettingError, UnavailableError

RUN = "cats-12345678"
SLOW = -1


@pytest.fixture
def faulty_server():
    """Start servers that respond with a status, byte by byte (SLOW), or not at all for a minute (None)."""
    servers = []

    def start(response: int | None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self):
                if response is None:
                    stop.wait(60)
                    return
                if response == SLOW:
                    # Each byte arrives within the socket timeout.
                    with suppress(OSError):
                        while not stop.wait(0.1):
                            self.wfile.write(b"H")
                    return
                self.send_response(response)
                self.end_headers()
                self.wfile.write(b"pushed metrics are invalid")

            do_GET = do_PUT

            def log_message(self, *_):
                pass

        stop = threading.Event()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append((server, stop))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, stop in servers:
        stop.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def outcome() -> Metrics:
    metrics = Metrics()
    metrics.start_job(job="cats", run=RUN, stage="fine-tune", version="0.1.0")
    return metrics


@pytest.mark.parametrize("response", [None, SLOW], ids=["silent", "slow"])
def test_push_to_a_silent_or_slow_pushgateway_times_out(faulty_server, outcome, response):
    url, started = faulty_server(response), time.monotonic()
    with pytest.raises(UnavailableError) as caught:
        push_outcome(url, outcome, seconds=0.3)
    assert time.monotonic() - started < 10
    assert str(caught.value) in {
        f"The Pushgateway {url} did not answer within 0.3 s.",
        f"The Pushgateway {url} can't be reached: timed out.",
    }


def test_push_reports_the_error_of_the_pushgateway(faulty_server, outcome):
    url = faulty_server(400)
    with pytest.raises(UnavailableError) as caught:
        push_outcome(url, outcome)
    assert str(caught.value) == f"The Pushgateway {url} rejected the request with HTTP 400: pushed metrics are invalid"


def test_delete_reports_a_server_that_is_not_a_pushgateway(faulty_server):
    with pytest.raises(UnavailableError, match="does not answer like a Pushgateway"):
        delete_outcome(faulty_server(200), RUN)


def test_push_reports_an_unreachable_pushgateway(outcome):
    with pytest.raises(UnavailableError, match=r"^The Pushgateway http://127.0.0.1:9 can't be reached: .*refused"):
        push_outcome("http://127.0.0.1:9", outcome)


def test_only_node_0_pushes():
    metrics = Metrics(gpus=False)
    metrics.start_job(job="cats", run=RUN, stage="fine-tune", version="0.1.0", node=1, nodes=2)
    push_outcome("http://127.0.0.1:9", metrics)
    metrics.start_job(job="cats", run=RUN, stage="fine-tune", version="0.1.0", node=0, nodes=2)
    with pytest.raises(UnavailableError, match="refused"):
        push_outcome("http://127.0.0.1:9", metrics)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pushgateway:9091", "is not a URL. Expected http"),
        ("http://169.254.169.254", "is a link-local address or a cloud metadata service"),
        ("http://8.8.8.8:9091", "is plain HTTP to 8.8.8.8"),
    ],
)
def test_push_rejects_forbidden_urls(url, message, outcome):
    with pytest.raises(SettingError, match=message):
        push_outcome(url, outcome)


def test_delete_without_a_pushgateway_reports_how_to_specify_it():
    result = CliRunner().invoke(app, ["metrics", "delete", RUN])
    assert str(result.exception) == (
        f"The Pushgateway of {RUN} is unknown. Pass --pushgateway http://host:port, or a job spec with "
        "spec.metrics.pushgateway as --file."
    )


def test_delete_runs_without_training_libraries():
    code = (
        "import sys, topwork.cli.commands.metrics, topwork.clients.prometheus.pushgateway\n"
        "assert not {'tensorflow', 'boto3'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
