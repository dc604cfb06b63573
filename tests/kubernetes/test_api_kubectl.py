"""kubectl with the fake API server, which shows that the server behaves like a real one."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_server import ApiServer, owner_references
from tests.cluster.kubectl import Kubectl as KubectlOfTests

KUBECTL = Path(sys.executable).with_name("kubectl")
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def open_server() -> Iterator[ApiServer]:
    """A server that requires no token, because kubectl sends none without TLS."""
    with ApiServer(token=None) as server:
        yield server


@pytest.fixture
def kubectl(open_server: ApiServer, tmp_path: Path) -> Kubectl:
    file = open_server.kubeconfig(tmp_path / "config")
    options = [str(KUBECTL), "--kubeconfig", str(file), "--cache-dir", str(tmp_path / "cache")]

    def run(*arguments: str, stdin: object = None) -> "subprocess.CompletedProcess[str]":
        text = json.dumps(stdin) if stdin else None
        return subprocess.run(
            [*options, *arguments], input=text, capture_output=True, text=True, check=False, timeout=60
        )

    return run


def job(retries: int = 3, image: str = "topwork") -> dict[str, object]:
    template = {"spec": {"containers": [{"name": "fine-tune", "image": image}]}}
    spec = {"backoffLimit": retries, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run"}, "spec": spec}


def test_kubectl_applies_and_gets_the_errors_of_a_real_server(open_server: ApiServer, kubectl: Kubectl):
    apply = ("apply", "--server-side", "--validate=false", "-f", "-")
    assert kubectl(*apply, stdin=job()).stdout == "job.batch/run serverside-applied\n"
    other = kubectl(*apply, "--field-manager=other", stdin=job(retries=5))
    assert 'Apply failed with 1 conflict: conflict with "kubectl" using batch/v1: .spec.backoffLimit' in other.stderr
    changed = kubectl(*apply, stdin=job(image="another"))
    assert changed.stderr.startswith('The Job "run" is invalid: spec.template: Invalid value: ')
    assert changed.stderr.endswith(": field is immutable\n")
    assert kubectl("get", "job", "none").stderr == 'Error from server (NotFound): jobs.batch "none" not found\n'


def test_kubectl_watches_and_deletes(open_server: ApiServer, kubectl: Kubectl):
    stored = open_server.put(job())
    owned = {"name": "p", "ownerReferences": owner_references(stored)}
    open_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": owned, "spec": {"containers": []}})
    open_server.deletion_seconds = 0.5
    deleted = kubectl("delete", "job", "run", "--cascade=foreground")
    assert (deleted.returncode, deleted.stderr) == (0, "")
    assert [open_server.list(kind) for kind in ("Job", "Pod")] == [[], []]


def test_kubectl_follows_a_log(open_server: ApiServer, kubectl: Kubectl):
    spec = {"containers": [{"name": "fine-tune"}, {"name": "waits"}]}
    open_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec})
    open_server.append_log("p", "fine-tune", "one")
    threading.Timer(1.0, open_server.append_log, ("p", "fine-tune", "two")).start()
    threading.Timer(1.5, open_server.end_log, ("p", "fine-tune")).start()
    assert kubectl("logs", "p", "-c", "fine-tune", "-f").stdout == "one\ntwo\n"
    assert kubectl("logs", "p", "-c", "waits").stderr == (
        'Error from server (BadRequest): container "waits" in pod "p" is waiting to start: PodInitializing\n'
    )


def test_states_of_a_deleted_pod_are_watched_until_it_is_gone(
    open_server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KUBECONFIG", str(open_server.kubeconfig(tmp_path / "config")))
    stored = open_server.put(job())
    metadata = {"name": "p", "ownerReferences": owner_references(stored)}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}}
    open_server.put({**pod, "status": {"phase": "Running"}})
    open_server.deletion_seconds = 2.0
    stopped = {"phase": "Failed", "message": "stopped"}
    threading.Timer(1.0, open_server.patch, ("Pod", "p", {"status": stopped})).start()
    states = KubectlOfTests("team-a").delete_and_watch("p", seconds=30)
    assert [states[0]["status"]["phase"], states[-1]["status"]] == ["Running", stopped]
