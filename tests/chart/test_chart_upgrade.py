"""Install and upgrade by Helm itself, on a server that behaves like the API: what is never changed, what is kept."""

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
    # client-go sends no token over plain HTTP.
    with ApiServer(token=None) as started:
        yield started


SERVER_SIDE, THREE_WAY = "server-side apply", "three-way merge"
# Helm 3 merges on its own side, and so does Helm 4 for releases of it; the server of the tests takes no such patch.
both_ways = pytest.mark.parametrize("apply", [SERVER_SIDE, THREE_WAY], indirect=True)


@pytest.fixture
def apply(
    request: pytest.FixtureRequest, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Apply]:
    """Install, and from the second call on upgrade, the release topwork; gives its notes."""
    options = helm_python.config._opts

    def with_more(**pairs: Any) -> str | None:
        own = getattr(request, "param", SERVER_SIDE) == SERVER_SIDE
        if "reset_values" in pairs:
            # The server has no OpenAPI.
            pairs |= {"disable_openapi_validation": True, "server_side_apply": str(own).lower()}
        elif "create_namespace" in pairs:
            pairs |= {"disable_openapi_validation": True, "server_side_apply": own}
        return options(**pairs)

    monkeypatch.setattr(helm_python.config, "_opts", with_more)
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    settings = {"namespace": NAMESPACE, "storage_driver": "memory", "qps": 1000.0, "burst_limit": 1000}
    with helm_python.Config(kubeconfig_path=kubeconfig, **settings) as config:
        done: list[str] = []

        def act(**values: Any) -> str:
            # The server knows no roles.
            values = {"submitters": {"create": False}} | values
            release = (config.upgrade if done else config.install)(CHART, "topwork", values)
            done.append(release["notes"])
            return done[-1]

        yield act


def jobs(**changes: Any) -> dict[str, Any]:
    return {"cats": {"spec": SPEC | changes}}


def job(server: ApiServer) -> dict[str, Any]:
    (found,) = server.list("Job")
    return found


@both_ways
def test_a_job_that_is_there_is_never_changed(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    # What the API server adds to every Job.
    name = job(server)["metadata"]["name"]
    server.patch("Job", name, {"spec": {"selector": {"matchLabels": {"controller-uid": "1"}}, "suspend": False}})
    before, config_map = job(server)["spec"], server.get("ConfigMap", name)["data"]
    notes = apply(jobs=jobs(compute={"memory": "64Gi"}))
    assert (job(server)["spec"], server.get("ConfigMap", name)["data"]) == (before, config_map)
    assert f"topwork cancel {name} -n {NAMESPACE}" in notes


@both_ways
def test_the_same_values_again_leave_the_job_as_it_is(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    before = job(server)
    assert "with other settings" not in apply(jobs=jobs())
    assert (job(server)["spec"], job(server)["metadata"]["uid"]) == (before["spec"], before["metadata"]["uid"])


@both_ways
def test_another_spec_is_another_job(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    before = job(server)["metadata"]["name"]
    apply(jobs=jobs(seed=1))
    assert job(server)["metadata"]["name"] != before
    assert server.get("ConfigMap", before) is None


def test_a_job_goes_on_with_its_image_when_the_default_changes(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    before = job(server)["spec"]
    apply(jobs=jobs(), defaults={"image": "another:1"})
    assert job(server)["spec"] == before


def test_a_job_that_was_deleted_comes_back_with_the_new_settings(apply: Apply, server: ApiServer) -> None:
    apply(jobs=jobs())
    server.remove("Job", job(server)["metadata"]["name"])
    apply(jobs=jobs(compute={"memory": "64Gi"}))
    (container,) = job(server)["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "64Gi"


def test_the_commands_know_the_jobs_of_the_chart(apply: Apply, server: ApiServer, tmp_path: Path) -> None:
    apply(jobs=jobs())
    found = job(server)
    assert found["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "Helm"
    assert is_managed_by_topwork(found)
    cluster = connect(ClusterSettings(kubeconfig=str(tmp_path / "kubeconfig")))
    assert len(read_run_objects(cluster, found["metadata"]["name"]).jobs) == 1


def test_keys_of_the_embedded_server_are_drawn_once(apply: Apply, server: ApiServer) -> None:
    apply(seaweedfs={"enabled": True})
    before = server.get("Secret", "topwork-s3")["data"]
    apply(seaweedfs={"enabled": True, "size": "20Gi"}, jobs=jobs())
    assert server.get("Secret", "topwork-s3")["data"] == before
    assert len(base64.b64decode(before["AWS_SECRET_ACCESS_KEY"])) == 40
