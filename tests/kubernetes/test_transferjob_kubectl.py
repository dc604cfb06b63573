"""TransferJobs with kubectl: apply, get, watch, explain, wait, edit, patch and delete over the real definition."""

import json
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import ApiServer

from topwork.cluster.definition import definition

KUBECTL = Path(sys.executable).with_name("kubectl")
EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "cats-vs-dogs.yaml"
Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]
STATUS = {
    "observedGeneration": 1,
    "state": "Running",
    "stage": "transfer",
    "progress": "3/10 epochs",
    "eta": "4m",
    "metric": "validation_accuracy 0.9312",
    "run": "cats-vs-dogs-1a2b3c4d",
    "attempts": 2,
    "gpus": 1,
    "waitingFor": None,
}
COMPLETE = {
    "type": "Complete",
    "status": "True",
    "reason": "Published",
    "message": "The model is published.",
    "lastTransitionTime": "2026-03-01T12:00:00Z",
    "observedGeneration": 1,
}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """A server with the definition of TransferJobs, which requires no token, because kubectl sends none without TLS."""
    with ApiServer(token=None, crds=[definition()]) as api_server:
        yield api_server


@pytest.fixture
def options(server: ApiServer, tmp_path: Path) -> list[str]:
    file = server.kubeconfig(tmp_path / "config")
    return [str(KUBECTL), "--kubeconfig", str(file), "--cache-dir", str(tmp_path / "cache")]


@pytest.fixture
def kubectl(options: list[str]) -> Kubectl:
    def run(*arguments: str, stdin: Any = None, **environment: str) -> "subprocess.CompletedProcess[str]":
        text = json.dumps(stdin) if stdin else None
        command = [*options, *arguments]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=60, env=environment or None
        )

    return run


def example(**spec: Any) -> dict[str, Any]:
    """Return the example with changed fields of its spec."""
    content = yaml.safe_load(EXAMPLE.read_text())
    return content | {"spec": content["spec"] | spec}


def columns(output: str) -> list[list[str]]:
    """Split the lines of a table at two or more spaces."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in output.splitlines()]


def set_status(server: ApiServer, **status: Any) -> None:
    server.patch("TransferJob", "cats-vs-dogs", {"status": STATUS | status})


def test_client_side_apply_migrates_to_server_side_apply(server: ApiServer, kubectl: Kubectl):
    assert kubectl("apply", "-f", str(EXAMPLE)).returncode == 0
    before = server.get("TransferJob", "cats-vs-dogs")
    migrated = kubectl("apply", "--server-side", "-f", str(EXAMPLE))
    assert (migrated.returncode, migrated.stderr) == (0, "")
    after = server.get("TransferJob", "cats-vs-dogs")
    assert before and after and (before["spec"], before["metadata"]["generation"]) == (
        after["spec"], after["metadata"]["generation"]
    )  # fmt: skip


@pytest.mark.parametrize("options_of_apply", [(), ("--server-side",)], ids=["client-side", "server-side"])
def test_kubectl_applies_every_example_and_applies_it_again_without_change(
    server: ApiServer, kubectl: Kubectl, options_of_apply: tuple[str, ...]
):
    files = [argument for path in sorted(EXAMPLES.glob("*.yaml")) for argument in ("-f", str(path))]
    for _ in range(2):
        applied = kubectl("apply", *options_of_apply, *files)
        assert applied.returncode == 0, applied.stderr
        versions = {obj["metadata"]["name"]: obj["metadata"] for obj in server.list("TransferJob")}
    assert len(versions) == sum(path.read_text().count("kind: TransferJob") for path in EXAMPLES.glob("*.yaml"))
    assert {metadata["generation"] for metadata in versions.values()} == {1}
    if not options_of_apply:
        assert {line.rpartition(" ")[2] for line in applied.stdout.splitlines()} == {"unchanged"}


def test_kubectl_gets_the_columns_of_a_transfer_job(server: ApiServer, kubectl: Kubectl):
    kubectl("apply", "-f", str(EXAMPLE))
    set_status(server)
    header, row = columns(kubectl("get", "tj").stdout)
    assert header == ["NAME", "STATE", "STAGE", "PROGRESS", "ETA", "METRIC", "MODEL", "AGE"]
    assert row[:6] == ["cats-vs-dogs", "Running", "transfer", "3/10 epochs", "4m", "validation_accuracy 0.9312"]
    wide, row = columns(kubectl("get", "topwork", "-o", "wide").stdout)
    assert {*wide} - {*header} == {"RUN", "ATTEMPTS", "GPUS", "WAITING FOR", "ERROR"}
    assert {"cats-vs-dogs-1a2b3c4d", "2", "1"} <= {*row}


def test_kubectl_watches_the_state(server: ApiServer, kubectl: Kubectl, options: list[str]):
    kubectl("apply", "-f", str(EXAMPLE))
    set_status(server)
    with subprocess.Popen([*options, "get", "tj", "-w"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout
        lines = [watch.stdout.readline() for _ in range(2)]
        set_status(server, state="Complete", model="s3://bucket/topwork/models/cats-vs-dogs/1/")
        lines.append(watch.stdout.readline())
        watch.kill()
    assert [line.split()[1] for line in lines] == ["STATE", "Running", "Complete"]


def test_kubectl_waits_for_completion(server: ApiServer, kubectl: Kubectl):
    kubectl("apply", "-f", str(EXAMPLE))
    threading.Timer(0.5, set_status, (server,), {"state": "Complete", "conditions": [COMPLETE]}).start()
    started = time.monotonic()
    waited = kubectl("wait", "--for=condition=Complete", "tj/cats-vs-dogs", "--timeout=20s")
    assert waited.stdout == "transferjob.topwork.dev/cats-vs-dogs condition met\n"
    assert time.monotonic() - started < 10
    established = kubectl("wait", "--for=condition=Established", "crd/transferjobs.topwork.dev", "--timeout=20s")
    assert established.returncode == 0


def test_kubectl_explains_the_spec(kubectl: Kubectl):
    explained = kubectl("explain", "tj.spec.fineTune")
    assert explained.stdout.startswith("GROUP:      topwork.dev\nKIND:       TransferJob\nVERSION:    v1alpha1\n")
    assert "FIELD: fineTune <Object>" in explained.stdout
    assert "epochs\t<integer>\n    Maximum number of epochs." in explained.stdout
    assert "keep\t<string>\n  enum: best, last\n" in explained.stdout
    assert "waitingFor\t<string>" in kubectl("explain", "transferjobs.status").stdout


def test_kubectl_edits_and_patches_the_spec(server: ApiServer, kubectl: Kubectl, tmp_path: Path):
    kubectl("apply", "-f", str(EXAMPLE))
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nsed -i 's/^  suspend: false/  suspend: true/' \"$1\"\n")
    editor.chmod(editor.stat().st_mode | stat.S_IXUSR)
    edited = kubectl("edit", "tj", "cats-vs-dogs", KUBE_EDITOR=str(editor), PATH="/usr/bin:/bin")
    assert edited.stdout == "transferjob.topwork.dev/cats-vs-dogs edited\n", edited.stderr
    stored = server.get("TransferJob", "cats-vs-dogs")
    assert stored
    assert (stored["spec"]["suspend"], stored["metadata"]["generation"]) == (True, 2)
    kubectl("patch", "tj", "cats-vs-dogs", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    kubectl("annotate", "tj", "cats-vs-dogs", "topwork.dev/cancel=cats-vs-dogs-1a2b3c4d")
    stored = server.get("TransferJob", "cats-vs-dogs")
    assert stored
    assert (stored["spec"]["suspend"], stored["metadata"]["generation"]) == (False, 3)
    assert stored["metadata"]["annotations"]["topwork.dev/cancel"] == "cats-vs-dogs-1a2b3c4d"
    replaced = kubectl(
        "patch", "tj", "cats-vs-dogs", "--type=json", "-p", '[{"op": "remove", "path": "/spec/suspend"}]'
    )
    assert replaced.returncode == 0, replaced.stderr


def test_kubectl_deletes_a_transfer_job(server: ApiServer, kubectl: Kubectl):
    kubectl("apply", "-f", str(EXAMPLE))
    deleted = kubectl("delete", "-f", str(EXAMPLE))
    assert deleted.stdout == 'transferjob.topwork.dev "cats-vs-dogs" deleted from team-a namespace\n'
    assert server.list("TransferJob") == []


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"fineTun": {"epochs": 1}}, 'strict decoding error: unknown field "spec.fineTun"'),
        (
            {"transfer": {"epochs": "ten"}},
            'Invalid value: "string": spec.transfer.epochs in body must be of type integer: "string"',
        ),
        (
            {"transfer": {"epochs": 0}},
            "spec.transfer.epochs: Invalid value: 0: spec.transfer.epochs in body should be greater than or equal to 1",
        ),
        (
            {"fineTune": {"epochs": 3, "optimizer": {"learningRate": 0.5}}},
            "spec.fineTune.optimizer.learningRate: Invalid value: 0.5 is above spec.transfer.optimizer.learningRate",
        ),
        ({"publish": {"formats": ["onnx7"]}}, 'Unsupported value: "onnx7": supported values: '),
    ],
)
def test_kubectl_shows_why_a_spec_is_invalid(server: ApiServer, kubectl: Kubectl, spec: dict[str, Any], message: str):
    applied = kubectl("apply", "-f", "-", stdin=example(**spec))
    assert applied.returncode == 1
    assert message in applied.stderr
    assert server.list("TransferJob") == []


def test_server_side_apply_shows_unknown_fields(kubectl: Kubectl):
    applied = kubectl("apply", "--server-side", "-f", "-", stdin=example(fineTun={}))
    assert ".spec.fineTun: field not declared in schema" in applied.stderr


def test_definition_can_be_applied_and_deleted(server: ApiServer, kubectl: Kubectl):
    kubectl("apply", "-f", str(EXAMPLE))
    applied = kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=definition())
    assert applied.stdout.endswith("/transferjobs.topwork.dev serverside-applied\n"), applied.stderr
    assert [obj["metadata"]["name"] for obj in server.list("TransferJob")] == ["cats-vs-dogs"]
    assert kubectl("delete", "crd", "transferjobs.topwork.dev").returncode == 0
    assert "the server could not find the requested resource" in kubectl("get", "tj").stderr
