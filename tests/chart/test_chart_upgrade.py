"""Installing and upgrading the chart with Helm against the test API server."""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import helm_python.config
import pytest
from api_objects import KINDS, Kind
from api_server import NAMESPACE, ApiServer

from topwork.clients.kubernetes.cluster import ClusterSettings, connect
from topwork.cluster.operations.runs import read_run_objects
from topwork.cluster.operations.submit import is_managed_by_topwork

CHART = Path(__file__).parents[2] / "charts" / "topwork"
SPEC = {
    "storage": "s3://bucket/prefix",
    "dataset": {
        "source": {"tfds": "cats_vs_dogs"},
        "splits": {"train": "train[:80%]", "test": "train[80%:]"},
        "imageSize": [96, 96],
    },
    "model": {"base": {"application": "MobileNetV2"}},
}
Apply = Callable[..., str]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    for kind in (Kind("Service", "services"), Kind("StatefulSet", "statefulsets", "apps")):
        monkeypatch.setitem(KINDS, kind.name, kind)
    # client-go does not send tokens over plain HTTP.
    with ApiServer(token=None) as api_server:
        yield api_server


SERVER_SIDE, THREE_WAY = "server-side apply", "three-way merge"
# Helm 3 uses three-way merges, and so does Helm 4 for releases created by Helm 3.
# The test API server rejects merge patches, so these tests also check that Helm does not send any.
both_merge_strategies = pytest.mark.parametrize("apply", [SERVER_SIDE, THREE_WAY], indirect=True)


@pytest.fixture
def apply(
    request: pytest.FixtureRequest, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Apply]:
    """Function that installs the release topwork, and upgrades it from the second call on; returns the notes."""
    create_options = helm_python.config._opts

    def patched_options(**pairs: Any) -> str | None:
        server_side = getattr(request, "param", SERVER_SIDE) == SERVER_SIDE
        if "reset_values" in pairs:
            # The test API server has no OpenAPI endpoint.
            pairs |= {"disable_openapi_validation": True, "server_side_apply": str(server_side).lower()}
        elif "create_namespace" in pairs:
            pairs |= {"disable_openapi_validation": True, "server_side_apply": server_side}
        return create_options(**pairs)

    monkeypatch.setattr(helm_python.config, "_opts", patched_options)
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    settings = {"namespace": NAMESPACE, "storage_driver": "memory", "qps": 1000.0, "burst_limit": 1000}
    with helm_python.Config(kubeconfig_path=kubeconfig, **settings) as config:
        notes: list[str] = []

        def install_or_upgrade(**values: Any) -> str:
            # The test API server has no roles.
            values = {"submitters": {"create": False}} | values
            release = (config.upgrade if notes else config.install)(CHART, "topwork", values)
            notes.append(release["notes"])
            return notes[-1]

        yield install_or_upgrade


def jobs(**changes: Any) -> dict[str, Any]:
    return {"cats": {"spec": SPEC | changes}}


def job(server: ApiServer) -> dict[str, Any]:
    (only_job,) = server.list("Job")
    return only_job


@both_merge_strategies
def test_upgrade_does_not_change_an_existing_job(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    # Fields that the API server adds to every Job.
    name = job(server)["metadata"]["name"]
    server.patch("Job", name, {"spec": {"selector": {"matchLabels": {"controller-uid": "1"}}, "suspend": False}})
    before, config_map = job(server)["spec"], server.get("ConfigMap", name)["data"]
    notes = apply(jobs=jobs(compute={"memory": "64Gi"}))
    assert (job(server)["spec"], server.get("ConfigMap", name)["data"]) == (before, config_map)
    assert f"topwork cancel {name} -n {NAMESPACE}" in notes


@both_merge_strategies
def test_upgrade_with_the_same_values_keeps_the_job(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    before = job(server)
    assert "with different settings" not in apply(jobs=jobs())
    assert (job(server)["spec"], job(server)["metadata"]["uid"]) == (before["spec"], before["metadata"]["uid"])


@both_merge_strategies
def test_upgrade_with_another_spec_replaces_the_job(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    before = job(server)["metadata"]["name"]
    apply(jobs=jobs(seed=1))
    assert job(server)["metadata"]["name"] != before
    assert server.get("ConfigMap", before) is None


def test_upgrade_with_another_default_image_keeps_the_job(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    before = job(server)["spec"]
    apply(jobs=jobs(), defaults={"image": "another:1"})
    assert job(server)["spec"] == before


def test_upgrade_recreates_a_deleted_job_with_the_new_settings(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    server.remove("Job", job(server)["metadata"]["name"])
    apply(jobs=jobs(compute={"memory": "64Gi"}))
    (container,) = job(server)["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "64Gi"


def test_topwork_commands_find_jobs_of_the_chart(apply: Apply, server: ApiServer, tmp_path: Path) -> None:
    apply(jobs=jobs())
    chart_job = job(server)
    assert chart_job["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
    assert is_managed_by_topwork(chart_job)
    cluster = connect(ClusterSettings(kubeconfig=str(tmp_path / "kubeconfig")))
    assert len(read_run_objects(cluster, chart_job["metadata"]["name"]).jobs) == 1


def test_upgrade_keeps_the_generated_keys_of_the_embedded_server(apply: Apply, server: ApiServer) -> None:
    apply(seaweedfs={"enabled": True})
    before = server.get("Secret", "topwork-s3")["data"]
    apply(seaweedfs={"enabled": True, "size": "20Gi"}, jobs=jobs())
    assert server.get("Secret", "topwork-s3")["data"] == before
    assert len(base64.b64decode(before["AWS_SECRET_ACCESS_KEY"])) == 40
