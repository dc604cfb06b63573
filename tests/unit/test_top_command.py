"""The `topwork top` command, with processes that serve their metrics and with Prometheus responses."""

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

TIMEOUT_SECONDS = 30.0
ENTER_ALTERNATE_SCREEN, LEAVE_ALTERNATE_SCREEN = b"\x1b[?1049h", b"\x1b[?1049l"
NO_SERIES = b'{"status": "success", "data": {"resultType": "matrix", "result": []}}'
FAST = ("--once", "--interval", "0.2")


class CommandResult(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def top(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CommandResult]:
    """Run the command in this process."""

    def call(*arguments: object) -> CommandResult:
        monkeypatch.setattr("sys.argv", ["topwork", "top", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        return CommandResult(int(exited.value.code or 0), *capsys.readouterr())

    return call


class TrainingProcess:
    """A process that serves the metrics of a run."""

    def __init__(self, run: str) -> None:
        self.metrics = Metrics(gpus=False)
        self.metrics.start_job(job=run.rpartition("-")[0], run=run, stage="run", version="1.2.3")
        self.port = self.metrics.serve(0, "127.0.0.1")


@pytest.fixture
def cats() -> Iterator[TrainingProcess]:
    process = TrainingProcess("cats-1a2b3c4d")
    with process.metrics.track_stage("transfer"):
        process.metrics.set_planned_epochs("transfer", 20)
        process.metrics.set_epoch("transfer", 5)
        process.metrics.record_step(images=64, seconds=0.5)
        yield process


@contextmanager
def http_server(
    code: int, body: bytes, headers: dict[str, str] | None = None, credentials: bytes | None = None
) -> Iterator[str]:
    """Serve the same response to all requests, but 401 to those without the credentials; yields the URL."""
    expected = f"Basic {base64.b64encode(credentials).decode()}" if credentials else None

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code if expected in {None, self.headers.get("Authorization")} else 401)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ── Metrics pages ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_single_run_is_shown_in_detail(top: Callable[..., CommandResult], cats: TrainingProcess):
    result = top("--port", cats.port, *FAST)
    assert result.code == 0, result.err
    assert re.match(r"cats-1a2b3c4d: running, transfer for \d+s\n  epoch          5/20  ━{6}╌", result.out)
    assert f"  source         http://127.0.0.1:{cats.port}/metrics\n" in result.out


def test_once_computes_rates_from_two_readings(top: Callable[..., CommandResult], cats: TrainingProcess):
    stopped = threading.Event()

    def train() -> None:
        while not stopped.wait(0.02):
            cats.metrics.record_step(images=64, seconds=0.25)

    trainer = threading.Thread(target=train)
    trainer.start()
    runs = json.loads(top("--port", cats.port, "--json", "--interval", "0.5").out)
    stopped.set()
    trainer.join()
    assert [run["speed"] for run in runs] == [
        {"imagesPerSecond": 256.0, "stepSeconds": 0.25, "inputWait": None, "lately": True}
    ]


def test_several_runs_are_shown_as_a_table_and_can_be_selected_by_name(
    top: Callable[..., CommandResult], cats: TrainingProcess
):
    dogs = TrainingProcess("dogs-22222222")
    ports = ("--port", cats.port, "--port", dogs.port, *FAST)
    assert [line.split()[0] for line in top(*ports).out.splitlines()] == ["RUN", "cats-1a2b3c4d", "dogs-22222222"]
    for name in ("dogs", "dogs-22222222"):
        assert top(name, *ports).out.startswith("dogs-22222222: starting")


def test_without_a_terminal_it_prints_once(top: Callable[..., CommandResult], cats: TrainingProcess):
    assert top("--port", cats.port, "--interval", "0.2").code == 0


def test_ports_that_do_not_answer_are_ignored_if_another_does(top: Callable[..., CommandResult], cats: TrainingProcess):
    assert top("--port", closed_port(), "--port", cats.port, *FAST).code == 0


def test_without_an_answer_it_reports_the_urls_and_what_to_do(top: Callable[..., CommandResult]):
    port = closed_port()
    assert top("--port", port, *FAST) == CommandResult(
        75,
        "",
        f"topwork: No runs found: http://127.0.0.1:{port}/metrics does not answer (Connection refused). Start a run "
        "with `topwork run FILE --metrics-port 9101`, or specify where to look for runs: --port or --url of a process, "
        "-n NAMESPACE of a cluster, or --prometheus URL.\n",
    )


def test_another_exporter_at_the_url_is_reported(top: Callable[..., CommandResult]):
    with http_server(200, b"# TYPE statsd_lines counter\nstatsd_lines 3\n") as url:
        assert (
            f"No runs found: {url}/metrics does not serve metrics of topwork. Start"
            in top("--url", f"{url}/metrics").err
        )


@pytest.mark.parametrize(
    ("code", "body", "message"),
    [
        (200, b"<html>hello</html>", "does not serve metrics (<html>hello</html>). Check the URL."),
        (404, b"", "answers with HTTP 404: the path of a metrics page is usually /metrics."),
    ],
)
def test_web_page_at_the_url_is_reported(top: Callable[..., CommandResult], code: int, body: bytes, message: str):
    with http_server(code, body) as url:
        assert f"{url}/ {message}" in top("--url", f"{url}/").err


def test_unknown_run_is_reported_with_the_existing_runs(top: Callable[..., CommandResult], cats: TrainingProcess):
    assert top("dogs", "--port", cats.port, *FAST) == CommandResult(
        2, "", "topwork: Job or run dogs not found. Existing runs: cats-1a2b3c4d.\n"
    )


def test_process_that_stops_answering_is_shown_with_its_last_values():
    from topwork.cli.top.sources import MetricsPageSource

    body = b'topwork_stage_running{run="cats-1a2b3c4d",stage="transfer",transferjob="cats"} 1\n'
    with http_server(200, body) as url:
        source = MetricsPageSource([url], "")
        assert source.read(time.time())[0].state == "running"
    run = source.read(time.time() + 60)[0]
    assert (run.state, run.stage, run.reason) == ("gone", "transfer", "last answer 60s ago")


def test_control_sequences_in_labels_are_replaced(top: Callable[..., CommandResult]):
    body = b'topwork_stage_running{run="cats\x1b]0;owned\x07",stage="\x1b[2J",transferjob="cats"} 1\n'
    with http_server(200, body) as url:
        assert top("--url", url, *FAST).out.startswith("cats?]0;owned?: running, ?[2J\n")


def test_conflicting_sources_are_rejected(top: Callable[..., CommandResult]):
    message = (
        "topwork: Choose one source of runs: --port and --url, a cluster (-n, --context, --kubeconfig), or "
        "--prometheus, which can be combined with -n.\n"
    )
    assert top("--port", 9101, "--prometheus", "http://127.0.0.1:9090") == CommandResult(2, "", message)
    assert top("--port", 9101, "-n", "team-a") == CommandResult(2, "", message)


# ── Prometheus responses ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "body", "exit_code", "message"),
    [
        (200, b"<html>Grafana</html>", 2, "is not Prometheus: it answers with HTTP 200 (<html>Grafana</html>)."),
        (302, b"", 2, "is not Prometheus: it answers with HTTP 302 (empty response)."),
        (401, b"Unauthorized", 2, "denies access (HTTP 401). Add USER:PASSWORD@ before the host in the URL, or bypass"),
        (
            503,
            b'{"status": "error", "error": "busy"}',
            75,
            "could not run the query (HTTP 503: busy). Try again later.",
        ),
        (422, b'{"status": "error", "error": "too long"}', 2, "could not run the query (HTTP 422: too long)."),
    ],
)
def test_unusable_prometheus_responses_are_reported(
    top: Callable[..., CommandResult], code: int, body: bytes, exit_code: int, message: str
):
    with http_server(code, body, {"Location": "https://login.example.com/"} if code == 302 else {}) as url:
        result = top("--prometheus", url)
        assert (result.code, result.out) == (exit_code, "")
        assert f"{url} {message}" in result.err


def test_password_in_the_url_is_used_but_not_shown(top: Callable[..., CommandResult]):
    with http_server(200, NO_SERIES, credentials=b"alice:open sesame") as url:
        assert "denies access" in top("--prometheus", url).err
        result = top("--prometheus", url.replace("://", "://alice:open%20sesame@") + "/")
        assert "scraped no runs" in result.err
        assert "sesame" not in result.err


def test_prometheus_without_runs_is_reported_with_its_targets(top: Callable[..., CommandResult]):
    with http_server(200, NO_SERIES) as url:
        message = (
            f"Prometheus at {url} scraped no runs in namespace team-a in the last 5m. Its scrape targets: {url}/targets"
        )
        assert top("--prometheus", url, "-n", "team-a") == CommandResult(0, "", f"{message}\n")


# ── Terminal ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_a_terminal_it_updates_until_ctrl_c_and_prints_the_last_values(cats: TrainingProcess):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "topwork", "top", "--port", str(cats.port), "--interval", "0.2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment) as process:
        os.close(terminal)
        output = _read_until(controller, b"5/20")
        cats.metrics.set_epoch("transfer", 6)
        output += _read_until(controller, b"6/20")
        process.send_signal(signal.SIGINT)
        final_output = _read_until(controller, None).partition(LEAVE_ALTERNATE_SCREEN)[2]
        assert process.wait(TIMEOUT_SECONDS) == 0
    os.close(controller)
    assert ENTER_ALTERNATE_SCREEN in output
    assert b"6/20" in final_output


def _read_until(terminal: int, text: bytes | None) -> bytes:
    """Read until a text appears; None reads to the end."""
    output = b""
    while text is None or text not in output:
        ready, _, _ = select.select([terminal], [], [], TIMEOUT_SECONDS)
        assert ready, output
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the terminal is closed
            assert text is None, output
            break
    return output


def test_it_runs_without_training_libraries(cats: TrainingProcess):
    script = (
        "import sys\n"
        "for name in ('boto3', 'numpy', 'tensorflow', 'keras', 'matplotlib', 'PIL', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "from topwork.cli import main\n"
        f"sys.argv = ['topwork', 'top', '--port', '{cats.port}', '--json', '--interval', '0.2']\n"
        "main()"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout)[0]["run"] == "cats-1a2b3c4d"
