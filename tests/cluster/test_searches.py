"""TransferSearches applied with kubectl: trials, the published model, suspension and deletion."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.cluster.environment import DELETION_SECONDS, RUN_SECONDS
from tests.cluster.kubectl import Kubectl, wait_for
from tests.cluster.transfer_jobs import LONG_TRAINING, TransferJobRun

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(5 * RUN_SECONDS)]

RATE = "transfer.optimizer.learningRate"
SPLITS = {"train": "train[:60%]", "validation": "train[60%:80%]", "test": "train[80%:]"}
ApplySearch = Callable[..., tuple[Kubectl, str]]


@pytest.fixture
def apply_search(make_transfer_job: Callable[..., TransferJobRun], tmp_path: Path) -> Iterator[ApplySearch]:
    """Function that applies a search over the learning rate; returns kubectl and the name of the search."""
    applied: list[tuple[Kubectl, str]] = []

    def start(template: dict[str, Any] | None = None, **spec: Any) -> tuple[Kubectl, str]:
        job = make_transfer_job(**(template or {}))
        content = YAML(typ="safe").load(job.file.read_text())
        content["spec"]["dataset"]["splits"] = SPLITS
        space = {RATE: {"logUniform": [1e-4, 1e-2]}}
        search = content | {"kind": "TransferSearch"}
        search["spec"] = {"template": content["spec"], "space": space, "sampler": "random"} | spec
        file = tmp_path / "search.json"
        file.write_text(json.dumps(search))
        job.kubectl("apply", "--filename", str(file))
        applied.append((job.kubectl, job.name))
        return applied[-1]

    yield start
    for kubectl, name in applied:
        kubectl("delete", "transfersearch", name, "--ignore-not-found", check=False)


def status_of(kubectl: Kubectl, name: str) -> dict[str, Any]:
    return (kubectl.get("transfersearch", name) or {}).get("status") or {}


def test_a_search_publishes_its_best_trial_and_is_deleted_with_all_trials(apply_search: ApplySearch) -> None:
    kubectl, name = apply_search(trials=2, parallel=2)
    options = ("--for=condition=Complete", f"--timeout={3 * RUN_SECONDS:.0f}s")
    kubectl("wait", f"transfersearch/{name}", *options, seconds=3 * RUN_SECONDS + 30)
    status = status_of(kubectl, name)
    assert (status["progress"], status["trials"]["complete"]) == ("2/2", 2)
    assert status["model"].endswith(f"/models/{name}/1")
    assert RATE in status["best"]["params"]
    header, line = kubectl("get", "transfersearch", name).splitlines()
    assert header.split() == ["NAME", "STATE", "TRIALS", "RUNNING", "BEST", "MODEL", "AGE"]
    assert line.split()[:4] == [name, "Complete", "2/2", "0"]
    kubectl("delete", "transfersearch", name)
    selector = f"topwork.dev/search={status['search']}"
    for kind in ("transferjob", "configmap", "job", "pod"):
        wait_for(lambda kind=kind: not kubectl.items(kind, labels=selector), f"no {kind}", seconds=DELETION_SECONDS)


def test_a_suspended_search_frees_what_its_trials_hold(apply_search: ApplySearch) -> None:
    kubectl, name = apply_search({"transfer": LONG_TRAINING}, trials=2, parallel=2)
    wait_for(lambda: status_of(kubectl, name).get("state") == "Running", "running search", seconds=RUN_SECONDS)
    selector = f"topwork.dev/search={status_of(kubectl, name)['search']}"
    kubectl("patch", "transfersearch", name, "--type=merge", "--patch", '{"spec": {"suspend": true}}')
    wait_for(lambda: not kubectl.items("pod", labels=selector), "end of all pods", seconds=DELETION_SECONDS)
    assert status_of(kubectl, name)["state"] == "Suspended"
