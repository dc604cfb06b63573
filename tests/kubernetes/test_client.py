"""`topwork.client`: running TransferJobs from Python, and the examples of docs/client.md."""

import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import api_statuses
import pytest
import sample_objects
import sample_transfer_jobs as samples
from api_server import ApiServer
from api_statuses import Fault
from running_controller import running_controller
from sample_objects import MODEL, RUN
from sample_transfer_jobs import put_transfer_job, set_status
from simulated_cluster import wait_for, write_spec

from topwork import client
from topwork.client import Applied, JobCanceledError, JobFailedError, TransferJobStatus, apply, cancel, status, wait
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.definition import definition
from topwork.errors import SettingError, SpecError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "client.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def server(api_server: ApiServer, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    """An API server that serves TransferJobs, and that $KUBECONFIG names."""
    api_server.install_crd(definition())
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    monkeypatch.setattr(client, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.05)
    return api_server


def later(step: Callable[[], object], seconds: float = 0.3) -> None:
    threading.Timer(seconds, step).start()


def stored(server: ApiServer) -> dict[str, Any]:
    obj = server.get("TransferJob", "flowers")
    assert obj is not None
    return obj


def test_apply_accepts_a_file_a_mapping_and_a_model(server: ApiServer, tmp_path: Path):
    file = write_spec(tmp_path / "flowers.yaml")
    assert apply(file) == Applied("flowers", "team-a", RUN, "submitted")
    content = stored(server)["spec"]
    assert apply(str(file)).outcome == "unchanged"
    assert apply(sample_objects.spec()).outcome == "unchanged"
    assert apply(sample_objects.transfer_job()).outcome == "unchanged"
    assert stored(server)["spec"] == content


def test_apply_accepts_overrides_and_an_image(server: ApiServer, tmp_path: Path):
    applied = apply(write_spec(tmp_path / "flowers.yaml"), overrides=["spec.seed=7"], image="example.com/topwork:1")
    spec = stored(server)["spec"]
    assert (spec["seed"], spec["compute"]["image"]) == (7, "example.com/topwork:1")
    assert applied.run != RUN
    with pytest.raises(SettingError, match="overrides change the values of a file"):
        apply(sample_objects.spec(), overrides=["spec.seed=7"])


def test_apply_does_not_write_defaults_of_the_namespace(server: ApiServer, tmp_path: Path):
    defaults = {"defaults.yaml": "spec: {storage: s3://artifacts/topwork, compute: {queue: team-a}}"}
    server.put({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "topwork-defaults"}, "data": defaults})
    spec = sample_objects.spec()
    del spec["spec"]["storage"]
    applied = apply(spec)
    assert "storage" not in stored(server)["spec"]
    assert "queue" not in stored(server)["spec"]["compute"]
    assert applied.run != RUN


def test_apply_reports_all_problems(server: ApiServer):
    spec = sample_objects.spec(gpus=-1)
    spec["spec"]["sed"] = 7
    with pytest.raises(SpecError) as raised:
        apply(spec)
    assert "spec.compute.gpus" in str(raised.value)
    assert "spec.sed" in str(raised.value)
    assert server.list("TransferJob") == []


def test_apply_uses_the_namespace_of_the_spec(server: ApiServer):
    spec = sample_objects.spec()
    spec["metadata"]["namespace"] = "default"
    assert apply(spec).namespace == "default"
    with pytest.raises(SettingError, match=r"metadata\.namespace is default, but namespace is team-a"):
        apply(spec, namespace="team-a")


def test_apply_without_the_definition_names_the_fix(api_server: ApiServer, kubeconfig: Path):
    with pytest.raises(SettingError, match="The cluster does not serve TransferJobs"):
        apply(sample_objects.spec(), kubeconfig=kubeconfig)


def test_apply_runs_a_complete_run_again_on_request(server: ApiServer):
    apply(sample_objects.spec())
    set_status(server, samples.COMPLETE)
    assert apply(sample_objects.spec()).outcome == "complete"
    assert apply(sample_objects.spec(), rerun=True).outcome == "replaced"
    assert "status" not in stored(server)


def test_status_of_a_transferjob(server: ApiServer):
    put_transfer_job(server)
    assert status("flowers") == TransferJobStatus()
    set_status(server, samples.COMPLETE)
    read = status("flowers")
    assert (read.state, read.model, read.model_version, read.gpu_seconds) == ("Complete", MODEL, 3, 7200.0)
    with pytest.raises(SettingError, match="transferjob/roses does not exist in namespace team-a"):
        status("roses")


def test_wait_returns_the_model_and_reports_each_change(server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    next_status = {"Pending": samples.status("Running", stage="transfer"), "Running": samples.COMPLETE}
    states: list[str] = []

    def act_as_controller(current: TransferJobStatus) -> None:
        states.append(current.state)
        if current.state in next_status:
            server.patch("TransferJob", "flowers", {"status": next_status[current.state]})

    final = wait("flowers", timeout_seconds=20, on_change=act_as_controller)
    assert (final.model, states) == (MODEL, ["Pending", "Running", "Complete"])


def test_wait_ignores_the_status_of_an_earlier_spec(server: ApiServer):
    put_transfer_job(server, samples.COMPLETE)
    server.patch("TransferJob", "flowers", {"spec": {"seed": 7}})
    with pytest.raises(TimeoutError, match=r"not yet processed generation 2 of the spec\. The run continues"):
        wait("flowers", timeout_seconds=0.3)
    later(lambda: set_status(server, samples.status("Complete", generation=2, run="flowers-87654321")))
    assert wait("flowers", timeout_seconds=20).run == "flowers-87654321"


@pytest.mark.parametrize(
    ("final", "error", "code", "text"),
    [
        (samples.FAILED, JobFailedError, 2, "no bucket photos"),
        (samples.INVALID, JobFailedError, 2, "spec.a: wrong\nspec.b: wrong, too"),
        (samples.CANCELLED, JobCanceledError, 143, "the run was canceled"),
    ],
    ids=["failed", "invalid", "canceled"],
)
def test_wait_raises_an_error_with_exit_code_and_cause(
    server: ApiServer, final: dict[str, Any], error: type[JobFailedError], code: int, text: str
):
    put_transfer_job(server, final)
    with pytest.raises(JobFailedError) as raised:
        wait("flowers", timeout_seconds=5)
    assert type(raised.value) is error
    assert (raised.value.name, raised.value.exit_code, raised.value.error) == ("flowers", code, text)
    assert raised.value.status.state == final["state"]


def test_wait_ends_if_the_transferjob_is_deleted(server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    with pytest.raises(JobCanceledError, match="ended with exit code 143: the TransferJob was deleted"):
        wait("flowers", timeout_seconds=20, on_change=lambda _: server.remove("TransferJob", "flowers"))


def test_wait_survives_an_outage_of_the_api_server(server: ApiServer):
    put_transfer_job(server, samples.PENDING)
    outage = Fault(api_statuses.service_unavailable(), path="/transferjobs", headers={"Retry-After": "0"})

    def break_off(current: TransferJobStatus) -> None:
        if current.state == "Pending":
            server.patch("TransferJob", "flowers", {"status": samples.COMPLETE})
            server.inject(outage, times=12)

    assert wait("flowers", timeout_seconds=60, on_change=break_off).model == MODEL
    assert [request.code for request in server.requests].count(503) == 12


def test_cancel_waits_until_the_run_is_canceled(server: ApiServer):
    put_transfer_job(server, samples.PENDING)

    def act_as_controller() -> None:
        wait_for(lambda: stored(server)["metadata"].get("annotations"), "cancel annotation")
        set_status(server, samples.CANCELLED)

    later(act_as_controller, 0.0)
    cancel("flowers")
    assert status("flowers").state == "Cancelled"
    cancel("flowers")  # changes nothing


def test_import_is_fast_and_needs_no_training_libraries():
    code = (
        "import sys\n"
        "for name in ('tensorflow', 'keras', 'numpy', 'boto3'): sys.modules[name] = None\n"
        "from topwork.client import apply, wait, status\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# The examples of the page


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decorators of Airflow, which call the decorated function as `dag.test()` does."""

    def decorator(**_: object) -> Callable[[Any], Any]:
        return lambda function: function

    exceptions, sdk = types.ModuleType("airflow.exceptions"), types.ModuleType("airflow.sdk")
    exceptions.AirflowFailException = type("AirflowFailException", (Exception,), {})  # type: ignore[attr-defined]
    sdk.dag = sdk.task = decorator  # type: ignore[attr-defined]
    for name, module in (
        ("airflow", types.ModuleType("airflow")),
        (sdk.__name__, sdk),
        ("airflow.exceptions", exceptions),
    ):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def controller(server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    with running_controller(server, cluster):
        yield


@pytest.mark.usefixtures("airflow", "controller")
@pytest.mark.parametrize("code", EXAMPLES, ids=["notebook", "mapping", "airflow"])
def test_examples_of_the_page_run(code: str, server: ApiServer, capsys: pytest.CaptureFixture[str]):
    exec(compile(code, "docs/client.md", "exec"), {"__name__": "example"})
    states = {obj["status"]["state"] for obj in server.list("TransferJob")}
    assert states == {"Complete"}
    if "print(final.model)" in code:
        assert capsys.readouterr().out.splitlines()[-1].startswith("s3://")


def test_page_names_all_functions_and_errors():
    errors = {name for name in client.__all__ if name.endswith("Error")}
    assert {"apply", "wait", "status", "cancel", *errors} <= set(re.findall(r"`(\w+)", PAGE))
