"""What came of a run, at the real Pushgateway of Debian."""

import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from topwork.cli import app
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.prometheus.pushgateway import push_outcome
from topwork.spec.loading.loader import read_jobs

SERVER = shutil.which("prometheus-pushgateway")
SPEC = Path(__file__).parents[2] / "examples" / "cats-vs-dogs.yaml"
RUN = "cats-12345678"


@pytest.fixture(scope="module")
def gateway():
    if SERVER is None:
        pytest.skip("no prometheus-pushgateway; `make prometheus` installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([SERVER, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as ready:
                if ready.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def outcome(run: str = RUN, accuracy: float = 0.9) -> Metrics:
    metrics = Metrics()
    metrics.start_job(job="cats", run=run, stage="fine-tune", version="0.1.0")
    with metrics.track_stage("transfer"):
        metrics.record_step(images=64, seconds=0.2)
    metrics.set_evaluation("test", {"accuracy": accuracy})
    metrics.set_failed_gates(1)
    metrics.set_exit_code("fine-tune", 3)
    return metrics


def shown(gateway: str, run: str = RUN) -> list[str]:
    """Lines of the series that a Pushgateway shows of a run, without its own."""
    with urllib.request.urlopen(f"{gateway}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return [line for line in lines if line.startswith("topwork_") and f'run="{run}"' in line]


def test_the_outcome_of_a_run_replaces_what_stood_for_it_and_goes_when_it_is_deleted(gateway):
    push_outcome(gateway, outcome(accuracy=0.1))
    push_outcome(gateway, outcome())
    push_outcome(gateway, outcome("cats-87654321"))
    labels = f'instance="",job="topwork",name="accuracy",run="{RUN}",split="test",transferjob="cats"'
    lines = shown(gateway)
    assert f"topwork_metric{{{labels}}} 0.9" in lines
    assert f'topwork_exit_code{{instance="",job="topwork",run="{RUN}",stage="fine-tune",transferjob="cats"}} 3' in lines
    assert not [line for line in lines if "running" in line or "last_progress" in line or "bucket" in line]
    told = CliRunner().invoke(app, ["metrics", "delete", RUN, "--pushgateway", gateway])
    assert (told.exit_code, told.output) == (0, f"Deleted {RUN} from {gateway}.\n")
    assert shown(gateway) == []
    assert shown(gateway, "cats-87654321")
    told = CliRunner().invoke(app, ["metrics", "delete", RUN, "--pushgateway", gateway])
    assert (told.exit_code, told.output) == (0, f"{gateway} has no metrics of {RUN}.\n")


def test_the_page_of_a_pushgateway_is_clean_for_promtool(gateway):
    push_outcome(gateway, outcome())
    with urllib.request.urlopen(f"{gateway}/metrics", timeout=60) as answer:
        families = answer.read().decode().split("# HELP ")
    page = "".join(f"# HELP {family}" for family in families if family.startswith("topwork_")).encode()
    assert page.count(b"# HELP") > 5
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_a_job_spec_says_which_run_and_which_pushgateway(gateway):
    run = read_jobs(SPEC)[0].run
    push_outcome(gateway, outcome(run))
    address = ("--set", f"spec.metrics.pushgateway={gateway}")
    told = CliRunner().invoke(app, ["metrics", "delete", "--file", str(SPEC), *address])
    assert (told.exit_code, told.output) == (0, f"Deleted {run} from {gateway}.\n")
    assert shown(gateway, run) == []
