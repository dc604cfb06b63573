"""Pushing and deleting the outcome of a run with a real Pushgateway."""

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
def gateway(tmp_path_factory):
    if SERVER is None:
        pytest.skip("prometheus-pushgateway is not installed; install it with: make prometheus")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The default file of some packages outlives the server.
    persistence = f"--persistence.file={tmp_path_factory.mktemp('pushgateway') / 'metrics'}"
    server = subprocess.Popen(
        [SERVER, f"--web.listen-address=127.0.0.1:{port}", persistence], stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def create_metrics(run: str = RUN, job: str = "cats", *, accuracy: float = 0.9) -> Metrics:
    metrics = Metrics()
    metrics.start_job(job=job, run=run, stage="fine-tune", version="0.1.0")
    with metrics.track_stage("transfer"):
        metrics.record_step(images=64, seconds=0.2)
    metrics.set_evaluation("test", {"accuracy": accuracy})
    metrics.set_failed_gates(1)
    metrics.set_exit_code("fine-tune", 3)
    return metrics


def pushed_lines(gateway: str, run: str = RUN) -> list[str]:
    """Return the lines of a run on the page of the Pushgateway."""
    with urllib.request.urlopen(f"{gateway}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return [line for line in lines if line.startswith("topwork_") and f'run="{run}"' in line]


def test_push_replaces_the_outcome_of_a_run_and_delete_removes_it(gateway):
    push_outcome(gateway, create_metrics(accuracy=0.1))
    push_outcome(gateway, create_metrics())
    push_outcome(gateway, create_metrics("cats-87654321"))
    labels = f'instance="",job="topwork",name="accuracy",run="{RUN}",split="test",transferjob="cats"'
    lines = pushed_lines(gateway)
    assert f"topwork_metric{{{labels}}} 0.9" in lines
    assert f'topwork_exit_code{{instance="",job="topwork",run="{RUN}",stage="fine-tune",transferjob="cats"}} 3' in lines
    assert not [line for line in lines if "running" in line or "last_progress" in line or "bucket" in line]
    result = CliRunner().invoke(app, ["metrics", "delete", RUN, "--pushgateway", gateway])
    assert (result.exit_code, result.output) == (0, f"Deleted {RUN} from {gateway}.\n")
    assert pushed_lines(gateway) == []
    assert pushed_lines(gateway, "cats-87654321")
    result = CliRunner().invoke(app, ["metrics", "delete", RUN, "--pushgateway", gateway])
    assert (result.exit_code, result.output) == (0, f"{gateway} has no metrics of {RUN}.\n")


def test_pushed_series_pass_promtool(gateway):
    push_outcome(gateway, create_metrics())
    with urllib.request.urlopen(f"{gateway}/metrics", timeout=60) as response:
        families = response.read().decode().split("# HELP ")
    page = "".join(f"# HELP {family}" for family in families if family.startswith("topwork_")).encode()
    assert page.count(b"# HELP") > 5
    completed = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert (completed.returncode, completed.stdout + completed.stderr) == (0, b"")


def test_delete_finds_the_run_of_a_job_spec(gateway):
    # The name depends on the dataset, which the spec does not tell.
    run, name = "cats-vs-dogs-0f1e2d3c", read_jobs(SPEC)[0].metadata.name
    push_outcome(gateway, create_metrics(run, name))
    push_outcome(gateway, create_metrics("cats-87654321"))
    arguments = ["metrics", "delete", "--file", str(SPEC), "--set", f"spec.metrics.pushgateway={gateway}"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, f"Deleted {run} from {gateway}.\n")
    assert pushed_lines(gateway, run) == []
    assert pushed_lines(gateway, "cats-87654321")
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.output) == (0, f"{gateway} has no metrics of {name}.\n")


def test_delete_lists_several_runs_of_a_job_and_deletes_none(gateway):
    runs, name = ["cats-vs-dogs-0f1e2d3c", "cats-vs-dogs-1a2b3c4d"], read_jobs(SPEC)[0].metadata.name
    for run in runs:
        push_outcome(gateway, create_metrics(run, name))
    result = CliRunner().invoke(app, ["metrics", "delete", "--file", str(SPEC), "--pushgateway", gateway])
    assert str(result.exception) == (
        f"{gateway} has metrics of 2 runs of {name}: {', '.join(runs)}. Nothing was deleted. Pass the name of one: "
        f"topwork metrics delete {runs[0]} --pushgateway {gateway}"
    )
    assert all(pushed_lines(gateway, run) for run in runs)
