"""The controller as the chart starts it: with its command line, its webhook, and no more permissions than its roles."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from access import Access, granted_access, required_access
from api_server import NAMESPACE, ApiServer
from controller_process import Controller, until
from simulated_controllers import SimulatedControllers

from topwork.cluster.definition import TRANSFER_SEARCH, definition

Render = Callable[..., dict[tuple[str, str], dict[str, Any]]]
SPEC = {
    "storage": "s3://bucket/prefix",
    "dataset": {
        "source": {"tfds": "cats_vs_dogs"},
        "splits": {"train": "train[:80%]", "test": "train[80%:]"},
        "imageSize": [96, 96],
    },
    "model": {"base": {"application": "MobileNetV2"}},
    "compute": {"nodes": 2},
}
# Needed to replace or explain a Job or for searches, which tests/kubernetes/test_permissions.py covers, or only by the
# API server.
NOT_USED_HERE = {
    Access("list", "", "events"),
    Access("delete", "batch", "jobs"),
    Access("delete", "", "configmaps"),
    Access("delete", "", "services"),
    Access("delete", "networking.k8s.io", "networkpolicies"),
    Access("get", "", "pods"),
    Access("update", "", "configmaps"),
    *(Access(verb, "topwork.dev", "transferjobs") for verb in ("create", "update", "delete")),
    Access("get", "topwork.dev", "transfersearches"),
    Access("patch", "topwork.dev", "transfersearches/status"),
    *(Access("get", "topwork.dev", f"{kind}/status") for kind in ("transferjobs", "transfersearches")),
    *(Access("update", "topwork.dev", f"{kind}/finalizers") for kind in ("transferjobs", "transfersearches")),
}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    crds = [definition(), definition(TRANSFER_SEARCH)]
    with ApiServer(crds=crds) as api_server, SimulatedControllers(api_server, stage_seconds=0.2):
        yield api_server


def test_controller_of_the_chart_runs_a_job_with_the_permissions_of_the_chart(
    render_chart: Render, server: ApiServer, tmp_path: Path
) -> None:
    objects = render_chart({"controller": {"webhook": {"enabled": True}}}, namespace=NAMESPACE)
    roles = [
        obj["rules"]
        for (kind, name), obj in objects.items()
        if kind in {"Role", "ClusterRole"} and ("topwork-controller" in name or "topwork-webhook" in name)
    ]
    name = f"topwork-webhook.{NAMESPACE}"
    server.put(objects["ValidatingWebhookConfiguration", name])
    metadata = {"name": "cats", "namespace": NAMESPACE}
    server.put({"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": metadata, "spec": SPEC})
    (container,) = objects["Deployment", f"{NAMESPACE}/topwork-controller"]["spec"]["template"]["spec"]["containers"]
    # Tests may run in parallel on one machine: use free ports.
    arguments = [word.replace("8080", "0").replace("9443", "0") for word in container["args"]]

    def state() -> str | None:
        return ((server.get("TransferJob", "cats") or {}).get("status") or {}).get("state")

    with Controller(server.kubeconfig(tmp_path / "kubeconfig"), *arguments) as controller:
        until(lambda: state() == "Complete", "complete run")
        configuration = server.get("ValidatingWebhookConfiguration", name)
        assert configuration and configuration["webhooks"][0]["clientConfig"]["caBundle"]
        assert controller.get("/readyz")[0] == 200
        assert controller.stop() == 0
    granted = {access for rules in roles for access in granted_access(rules)}
    assert required_access(server.requests) | NOT_USED_HERE == granted
