"""The commands of the hooks of the chart, run against the test API server, need no more than their roles grant."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sample_crd
from access import granted_access, required_access
from api_server import NAMESPACE, ApiServer

from topwork.cluster.definition import definition

Objects = dict[tuple[str, str], dict[str, Any]]
Render = Callable[..., Objects]
Run = Callable[[ApiServer, dict[str, Any]], tuple[int, str]]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as api_server:
        yield api_server


def upgrade_pod(objects: Objects) -> dict[str, Any]:
    return objects["Job", "topwork-crd-upgrade"]["spec"]["template"]["spec"]


def test_hook_creates_missing_definitions(server: ApiServer, render_chart: Render, run_pod: Run) -> None:
    objects = render_chart({})
    code, output = run_pod(server, upgrade_pod(objects))
    assert code == 0, output
    for name in ("transferjobs.topwork.dev", "transfersearches.topwork.dev"):
        assert server.get("CustomResourceDefinition", name)
    granted = granted_access(objects["ClusterRole", "topwork-crd-upgrade.ml"]["rules"])
    assert required_access(server.requests) == granted


def test_hook_upgrades_the_definition_and_keeps_transfer_jobs(
    server: ApiServer, render_chart: Render, run_pod: Run
) -> None:
    server.put(sample_crd.definition(), manager="helm")
    metadata = {"name": "flowers", "namespace": NAMESPACE}
    job = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": metadata, "spec": {"seed": 1}}
    before = server.put(job)
    code, output = run_pod(server, upgrade_pod(render_chart({})))
    assert code == 0, output
    stored = server.get("CustomResourceDefinition", "transferjobs.topwork.dev")
    assert stored and stored["spec"]["versions"] == definition()["spec"]["versions"]
    assert server.get("TransferJob", "flowers") == before


def test_test_pod_submits_the_sample_without_creating_it(server: ApiServer, render_chart: Render, run_pod: Run) -> None:
    server.install_crd(definition())
    rendered = render_chart({"defaults": {"spec": {"compute": {"queue": "team-a"}}}}, namespace=NAMESPACE)
    objects = {(kind, name.removeprefix(f"{NAMESPACE}/")): obj for (kind, name), obj in rendered.items()}
    for name in ("topwork-defaults", "topwork-test-submit"):
        server.put(objects["ConfigMap", name])
    code, output = run_pod(server, objects["Pod", "topwork-test-submit"]["spec"])
    assert code == 0, output
    assert "topwork-test" in output
    assert server.list("TransferJob") == []
    assert required_access(server.requests) == granted_access(objects["Role", "topwork-test-submit"]["rules"])
