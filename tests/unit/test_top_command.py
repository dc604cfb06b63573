"""`topwork top` as it is called, with processes that serve their metrics."""

import base64
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

from topwork.cli import main
from topwork.clients.prometheus.metrics import Metrics

PATIENCE_SECONDS = 30.0
ENTERED, LEFT = b"\x1b[?1049h", b"\x1b[?1049l"
"""What a terminal is told to show a screen of its own, and the one before again."""
NO_SERIES = b'{"status": "success", "data": {"resultType": "matrix", "result": []}}'
FAST = ("--once", "--interval", "0.2")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def top(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Call the command here."""

    def call(*words: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["topwork", "top", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return call


class Process:
    """A process that trains and serves its metrics."""

    def __init__(self, run: str) -> None:
        self.metrics = Metrics(gpus=False)
        self.metrics.start_job(job=run.rpartition("-")[0], run=run, stage="run", version="1.2.3")
        self.port = self.metrics.serve(0, "127.0.0.1")


@pytest.fixture
def cats() -> Iterator[Process]:
    process = Process("cats-1a2b3c4d")
    with process.metrics.track_stage("transfer"):
        process.metrics.set_planned_epochs("transfer", 20)
        process.metrics.set_epoch("transfer", 5)
        process.metrics.record_step(images=64, seconds=0.5)
        yield process


@contextmanager
def http_server(
    code: int, body: bytes, headers: dict[str, str] | None = None, login: bytes | None = None
) -> Iterator[str]:
    """A server that answers everything in the same way, 401 without the login that it wants; its address."""
    wanted = f"Basic {base64.b64encode(login).decode()}" if login else None

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if wanted in {None, self.headers.get("Authorization")} else 401)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# ── Ports ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_on_this_machine_is_shown_in_detail(top: Callable[..., Ended], cats: Process):
    ended = top("--port", cats.port, *FAST)
    assert ended.code == 0, ended.err
    assert re.match(r"cats-1a2b3c4d: running, transfer for \d+s\n  epoch          5/20  ━{6}╌", ended.out)
    assert f"  read from      http://127.0.0.1:{cats.port}/metrics\n" in ended.out


def test_rates_of_one_call_are_between_two_readings(top: Callable[..., Ended], cats: Process):
    ended = threading.Event()

    def train() -> None:
        while not ended.wait(0.02):
            cats.metrics.record_step(images=64, seconds=0.25)

    trainer = threading.Thread(target=train)
    trainer.start()
    told = json.loads(top("--port", cats.port, "--json", "--interval", "0.5").out)
    ended.set()
    trainer.join()
    assert [one["speed"] for one in told] == [
        {"imagesPerSecond": 256.0, "stepSeconds": 0.25, "inputWait": None, "lately": True}
    ]


def test_several_runs_are_a_table_and_one_can_be_chosen(top: Callable[..., Ended], cats: Process):
    dogs = Process("dogs-22222222")
    ports = ("--port", cats.port, "--port", dogs.port, *FAST)
    assert [line.split()[0] for line in top(*ports).out.splitlines()] == ["RUN", "cats-1a2b3c4d", "dogs-22222222"]
    for name in ("dogs", "dogs-22222222"):
        assert top(name, *ports).out.startswith("dogs-22222222: starting")


def test_off_a_terminal_it_prints_once(top: Callable[..., Ended], cats: Process):
    assert top("--port", cats.port, "--interval", "0.2").code == 0


def test_one_of_several_ports_is_enough(top: Callable[..., Ended], cats: Process):
    assert top("--port", closed_port(), "--port", cats.port, *FAST).code == 0


def test_where_nothing_listens_it_says_where_it_looked_and_what_to_do(top: Callable[..., Ended]):
    port = closed_port()
    assert top("--port", port, *FAST) == Ended(
        75,
        "",
        f"topwork: No run can be read: http://127.0.0.1:{port}/metrics does not answer (Connection refused). Start a "
        "run with: topwork run FILE --metrics-port 9101 - or say where runs are: --port or --url of a process, "
        "-n NAMESPACE of a cluster, --prometheus URL.\n",
    )


def test_an_exporter_of_something_else_at_the_port_is_told(top: Callable[..., Ended]):
    with http_server(200, b"# TYPE statsd_lines counter\nstatsd_lines 3\n") as url:
        assert (
            f"No run can be read: {url}/metrics serves no metrics of topwork. Start"
            in top("--url", f"{url}/metrics").err
        )


@pytest.mark.parametrize(
    ("code", "body", "told"),
    [
        (200, b"<html>hello</html>", "serves no metrics (<html>hello</html>). Look at the address."),
        (404, b"", "answers with HTTP 404: metrics are below /metrics as a rule."),
    ],
)
def test_a_web_page_at_the_address_is_told(top: Callable[..., Ended], code: int, body: bytes, told: str):
    with http_server(code, body) as url:
        assert f"{url}/ {told}" in top("--url", f"{url}/").err


def test_an_unknown_run_names_those_that_there_are(top: Callable[..., Ended], cats: Process):
    assert top("dogs", "--port", cats.port, *FAST) == Ended(
        2, "", "topwork: No job or run dogs can be read. There are: cats-1a2b3c4d.\n"
    )


def test_a_process_that_has_gone_is_shown_as_it_was():
    from topwork.cli.top.sources import Pages

    body = b'topwork_stage_running{run="cats-1a2b3c4d",stage="transfer",transferjob="cats"} 1\n'
    with http_server(200, body) as url:
        pages = Pages([url], "")
        assert pages.read(time.time())[0].state == "running"
    found = pages.read(time.time() + 60)[0]
    assert (found.state, found.stage, found.reason) == ("gone", "transfer", "last answer 60s ago")


def test_names_of_a_process_send_nothing_to_the_terminal(top: Callable[..., Ended]):
    body = b'topwork_stage_running{run="cats\x1b]0;owned\x07",stage="\x1b[2J",transferjob="cats"} 1\n'
    with http_server(200, body) as url:
        assert top("--url", url, *FAST).out.startswith("cats?]0;owned?: running, ?[2J\n")


def test_places_that_exclude_each_other_are_refused(top: Callable[..., Ended]):
    told = "topwork: Runs are read from one place: ports and URLs, a cluster, or --prometheus.\n"
    assert top("--port", 9101, "--prometheus", "http://127.0.0.1:9090") == Ended(2, "", told)
    assert top("--port", 9101, "-n", "team-a") == Ended(2, "", told)


# ── Prometheus' answers ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "body", "exit_code", "told"),
    [
        (200, b"<html>Grafana</html>", 2, "is no Prometheus: it answers with HTTP 200 (<html>Grafana</html>)."),
        (302, b"", 2, "is no Prometheus: it answers with HTTP 302 (nothing)."),
        (401, b"Unauthorized", 2, "refuses (HTTP 401). Write USER:PASSWORD@ before the host in the address, or reach"),
        (503, b'{"status": "error", "error": "busy"}', 75, "could not answer (HTTP 503: busy). Try again later."),
        (422, b'{"status": "error", "error": "too long"}', 2, "could not answer (HTTP 422: too long)."),
    ],
)
def test_what_is_no_prometheus_or_refuses_is_told(
    top: Callable[..., Ended], code: int, body: bytes, exit_code: int, told: str
):
    with http_server(code, body, {"Location": "https://login.example.com/"} if code == 302 else {}) as url:
        ended = top("--prometheus", url)
        assert (ended.code, ended.out) == (exit_code, "")
        assert f"{url} {told}" in ended.err


def test_a_password_in_the_address_is_used_and_never_said(top: Callable[..., Ended]):
    with http_server(200, NO_SERIES, login=b"alice:open sesame") as url:
        assert "refuses" in top("--prometheus", url).err
        ended = top("--prometheus", url.replace("://", "://alice:open%20sesame@") + "/")
        assert "has scraped no run" in ended.err
        assert "sesame" not in ended.err


def test_a_prometheus_without_runs_says_where_to_look(top: Callable[..., Ended]):
    with http_server(200, NO_SERIES) as url:
        told = (
            f"Prometheus at {url} has scraped no run of namespace team-a in the last 5m. What it scrapes: {url}/targets"
        )
        assert top("--prometheus", url, "-n", "team-a") == Ended(0, "", f"{told}\n")


# ── A terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_a_terminal_it_goes_on_until_ctrl_c_and_leaves_the_last_picture(cats: Process):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "topwork", "top", "--port", str(cats.port), "--interval", "0.2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = _read_until(ours, b"5/20")
        cats.metrics.set_epoch("transfer", 6)
        shown += _read_until(ours, b"6/20")
        process.send_signal(signal.SIGINT)
        left = _read_until(ours, None).partition(LEFT)[2]
        assert process.wait(PATIENCE_SECONDS) == 0
    os.close(ours)
    assert ENTERED in shown
    assert b"6/20" in left


def _read_until(terminal: int, text: bytes | None) -> bytes:
    """Read until a text comes, or with None to the end."""
    found = b""
    while text is None or text not in found:
        ready, _, _ = select.select([terminal], [], [], PATIENCE_SECONDS)
        assert ready, found
        try:
            found += os.read(terminal, 65536)
        except OSError:  # the other side is closed
            assert text is None, found
            break
    return found


def test_it_needs_no_training_libraries(cats: Process):
    script = (
        "import sys\n"
        "for name in ('boto3', 'numpy', 'tensorflow', 'keras', 'matplotlib', 'PIL', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "from topwork.cli import main\n"
        f"sys.argv = ['topwork', 'top', '--port', '{cats.port}', '--json', '--interval', '0.2']\n"
        "main()"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)[0]["run"] == "cats-1a2b3c4d"
