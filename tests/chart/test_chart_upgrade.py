"""Installing, upgrading and uninstalling the chart with Helm against the test API server."""

import base64
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import helm_python.config
import pytest
from api_server import NAMESPACE, ApiServer

from topwork.cluster.manifests.transfer_job import parse_transfer_job
from topwork.spec.loading.loader import read_jobs

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "topwork"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SPEC = {
    "storage": "s3://bucket/prefix",
    "dataset": {
        "source": {"tfds": "cats_vs_dogs"},
        "splits": {"train": "train[:80%]", "test": "train[80%:]"},
        "imageSize": [96, 96],
    },
    "model": {"base": {"application": "MobileNetV2"}},
}
Release = Callable[..., None]
CRD = "transferjobs.topwork.dev"
CRDS = (CRD, "transfersearches.topwork.dev")


@pytest.fixture
def server() -> Iterator[ApiServer]:
    # client-go does not send tokens over plain HTTP.
    with ApiServer(token=None) as api_server:
        yield api_server


SERVER_SIDE, THREE_WAY = "server-side apply", "three-way merge"
# Helm 3 uses three-way merges, and so does Helm 4 for releases created by Helm 3.
both_merge_strategies = pytest.mark.parametrize("config", [SERVER_SIDE, THREE_WAY], indirect=True)


@pytest.fixture
def config(
    request: pytest.FixtureRequest, server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[helm_python.Config]:
    create_options = helm_python.config._opts

    def patched_options(**pairs: Any) -> str | None:
        server_side = getattr(request, "param", SERVER_SIDE) == SERVER_SIDE
        if "reset_values" in pairs:
            pairs |= {"server_side_apply": str(server_side).lower()}
        elif "create_namespace" in pairs:
            pairs |= {"server_side_apply": server_side}
        return create_options(**pairs)

    monkeypatch.setattr(helm_python.config, "_opts", patched_options)
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    settings = {"namespace": NAMESPACE, "storage_driver": "memory", "qps": 1000.0, "burst_limit": 1000}
    with helm_python.Config(kubeconfig_path=kubeconfig, **settings) as connected:
        yield connected


@pytest.fixture
def apply(config: helm_python.Config) -> Release:
    """Function that installs the release topwork, and upgrades it from the second call on."""
    calls = []

    def install_or_upgrade(**values: Any) -> None:
        # No Job controller runs the hook.
        values = {"controller": {"crds": {"upgrade": False}}} | values
        (config.upgrade if calls else config.install)(CHART, "topwork", values)
        calls.append(values)

    return install_or_upgrade


@pytest.fixture
def hooks(server: ApiServer, run_pod: Callable[..., tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Run the Jobs and pods of hooks, as the kubelet does; yields their exit codes and outputs."""
    results: list[tuple[int, str]] = []
    is_stopping = threading.Event()

    def run(obj: dict[str, Any], pod: dict[str, Any]) -> None:
        results.append(run_pod(server, pod))
        is_success = results[-1][0] == 0
        condition = {"type": "Complete" if is_success else "Failed", "status": "True"}
        status = (
            {"conditions": [condition]} if obj["kind"] == "Job" else {"phase": "Succeeded" if is_success else "Failed"}
        )
        server.patch(obj["kind"], obj["metadata"]["name"], {"status": status})

    def run_all() -> None:
        done = set()
        while not is_stopping.wait(0.05):
            for obj in [*server.list("Job"), *server.list("Pod")]:
                if obj["metadata"]["uid"] not in done and "helm.sh/hook" in obj["metadata"]["annotations"]:
                    done.add(obj["metadata"]["uid"])
                    run(obj, obj["spec"]["template"]["spec"] if obj["kind"] == "Job" else obj["spec"])

    thread = threading.Thread(target=run_all, daemon=True)
    thread.start()
    yield results
    is_stopping.set()
    thread.join()


def jobs(name: str = "cats", **changes: Any) -> dict[str, Any]:
    return {name: {"labels": {"team": "vision"}, "spec": SPEC | changes}}


def user_job(server: ApiServer) -> dict[str, Any]:
    """Create a TransferJob as a user does with kubectl."""
    metadata = {"name": "flowers", "namespace": NAMESPACE}
    return server.put(
        {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": metadata, "spec": SPEC},
        manager="kubectl",
    )


@both_merge_strategies
def test_upgrade_with_the_same_values_changes_no_object(apply: Release, server: ApiServer) -> None:
    def versions() -> dict[str, str]:
        kinds = ("TransferJob", "Deployment", "Role", "RoleBinding", "ServiceAccount", "ConfigMap")
        stored = [obj["metadata"] for kind in kinds for obj in server.list(kind)]
        return {metadata["uid"]: metadata["resourceVersion"] for metadata in stored}

    apply(jobs=jobs())
    before = versions()
    apply(jobs=jobs())
    assert len(before) > 8
    assert versions() == before


@both_merge_strategies
def test_upgrade_changes_the_spec_and_keeps_what_users_and_the_controller_wrote(
    apply: Release, server: ApiServer
) -> None:
    apply(jobs=jobs())
    created = server.get("TransferJob", "cats")
    server.patch("TransferJob", "cats", {"metadata": {"annotations": {"topwork.dev/cancel": "cats-1"}}})
    server.patch("TransferJob", "cats", {"status": {"state": "Running"}})
    apply(jobs=jobs(seed=1))
    job = server.get("TransferJob", "cats")
    assert parse_transfer_job(job).spec.seed == 1
    assert job["metadata"]["uid"] == created["metadata"]["uid"]
    assert job["metadata"]["labels"]["team"] == "vision"
    assert job["metadata"]["annotations"]["topwork.dev/cancel"] == "cats-1"
    assert job["status"] == {"state": "Running"}


def test_installed_jobs_are_the_runs_of_the_same_files(apply: Release, server: ApiServer) -> None:
    # Helm installs the definition first; the server then adds its defaults.
    documents = [
        document
        for path in EXAMPLES
        for text in path.read_text(encoding="utf-8").split("\n---\n")
        if (document := helm_python.values_from_yaml(text))
    ]
    apply(jobs={document["metadata"]["name"]: {"spec": document["spec"]} for document in documents})
    runs = {parse_transfer_job(obj).run for obj in server.list("TransferJob")}
    assert runs == {job.run for path in EXAMPLES for job in read_jobs(path)}


def test_values_that_helm_reads_as_booleans_are_accepted(apply: Release, server: ApiServer) -> None:
    apply(jobs=jobs(transfer=helm_python.values_from_yaml("featureCache: off")))
    job = server.get("TransferJob", "cats")
    assert job["spec"]["transfer"]["featureCache"] is False
    assert parse_transfer_job(job).spec.transfer.feature_cache == "off"


def test_upgrade_applies_the_new_definition_and_deletes_the_hook(
    config: helm_python.Config, server: ApiServer, hooks: list[tuple[int, str]]
) -> None:
    config.install(CHART, "topwork", {"jobs": jobs()})
    assert hooks == []
    created = server.get("TransferJob", "cats")
    server.patch("CustomResourceDefinition", CRD, {"spec": {"names": {"categories": ["older"]}}})
    config.upgrade(CHART, "topwork", {"jobs": jobs()}, timeout=60)
    assert hooks == [(0, "".join(f"customresourcedefinition/{name} applied\n" for name in CRDS))]
    definition = server.get("CustomResourceDefinition", CRD)
    assert definition and definition["spec"]["names"]["categories"] == ["topwork"]
    assert server.get("TransferJob", "cats") == created
    left = [obj["metadata"]["name"] for kind in ("Job", "ServiceAccount") for obj in server.list(kind)]
    assert left == ["topwork-controller", "topwork-job"]
    assert server.get("ClusterRole", f"topwork-crd-upgrade.{NAMESPACE}") is None


def test_helm_test_submits_a_transfer_job_as_a_dry_run(
    config: helm_python.Config, server: ApiServer, hooks: list[tuple[int, str]]
) -> None:
    config.install(CHART, "topwork", {})
    config.test("topwork", timeout=60)
    ((code, output),) = hooks
    assert code == 0
    assert "topwork-test" in output
    assert server.list("TransferJob") == []


def test_uninstall_deletes_the_jobs_of_the_values_and_nothing_of_a_user(
    apply: Release, config: helm_python.Config, server: ApiServer
) -> None:
    apply(jobs=jobs() | jobs("dogs"))
    before = user_job(server)
    apply(jobs=jobs())
    assert [job["metadata"]["name"] for job in server.list("TransferJob")] == ["cats", "flowers"]
    config.uninstall("topwork")
    assert server.list("TransferJob") == [before]
    assert server.get("CustomResourceDefinition", CRD)
    assert server.list("Deployment") == []


def test_upgrade_keeps_the_generated_keys_of_the_embedded_server(apply: Release, server: ApiServer) -> None:
    apply(seaweedfs={"enabled": True})
    before = server.get("Secret", "topwork-s3")["data"]
    apply(seaweedfs={"enabled": True, "size": "20Gi"}, jobs=jobs())
    assert server.get("Secret", "topwork-s3")["data"] == before
    assert len(base64.b64decode(before["AWS_SECRET_ACCESS_KEY"])) == 40
