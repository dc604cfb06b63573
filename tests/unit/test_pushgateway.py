"""A Pushgateway that is away, slow or none at all; the real one is asked in tests/monitoring."""

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
DRIPS = -1


@pytest.fixture
def faulty():
    """Give the address of a server that answers with a status, drop by drop, or not at all within a minute."""
    servers = []

    def start(answer: int | None) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self):
                if answer is None:
                    done.wait(60)
                    return
                if answer == DRIPS:
                    # Each byte comes within the time-out of a socket.
                    with suppress(OSError):
                        while not done.wait(0.1):
                            self.wfile.write(b"H")
                    return
                self.send_response(answer)
                self.end_headers()
                self.wfile.write(b"pushed metrics are invalid")

            do_GET = do_PUT

            def log_message(self, *_):
                pass

        done = threading.Event()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append((server, done))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, done in servers:
        done.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def outcome() -> Metrics:
    metrics = Metrics()
    metrics.start_job(job="cats", run=RUN, stage="fine-tune", version="0.1.0")
    return metrics


@pytest.mark.parametrize("answer", [None, DRIPS], ids=["silent", "slow"])
def test_a_pushgateway_that_is_silent_or_slow_is_given_up_in_time(faulty, outcome, answer):
    address, began = faulty(answer), time.monotonic()
    with pytest.raises(UnavailableError) as refused:
        push_outcome(address, outcome, seconds=0.3)
    assert time.monotonic() - began < 10
    assert str(refused.value) in {
        f"The Pushgateway {address} did not answer within 0.3 s.",
        f"The Pushgateway {address} can't be reached: timed out.",
    }


def test_what_a_pushgateway_says_when_it_refuses_is_told(faulty, outcome):
    address = faulty(400)
    with pytest.raises(UnavailableError) as refused:
        push_outcome(address, outcome)
    assert str(refused.value) == f"The Pushgateway {address} refused with 400: pushed metrics are invalid"


def test_a_server_that_is_no_pushgateway_is_named(faulty):
    with pytest.raises(UnavailableError, match="does not answer as a Pushgateway does"):
        delete_outcome(faulty(200), RUN)


def test_a_pushgateway_that_is_away_is_named(outcome):
    with pytest.raises(UnavailableError, match=r"^The Pushgateway http://127.0.0.1:9 can't be reached: .*refused"):
        push_outcome("http://127.0.0.1:9", outcome)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("pushgateway:9091", "is no address. Expected http"),
        ("http://169.254.169.254", "is a cloud's own address"),
        ("http://8.8.8.8:9091", "is plain HTTP to 8.8.8.8"),
    ],
)
def test_addresses_that_no_outcome_may_go_to(address, said, outcome):
    with pytest.raises(SettingError, match=said):
        push_outcome(address, outcome)


def test_without_an_address_deleting_says_where_to_name_it():
    told = CliRunner().invoke(app, ["metrics", "delete", RUN])
    assert str(told.exception) == (
        f"The Pushgateway of {RUN} is unknown. Pass --pushgateway http://host:port, or a job spec with "
        "spec.metrics.pushgateway as --file."
    )


def test_deleting_needs_no_training_library():
    code = (
        "import sys, topwork.cli.commands.metrics, topwork.clients.prometheus.pushgateway\n"
        "assert not {'tensorflow', 'boto3'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
