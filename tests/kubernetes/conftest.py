"""Fixtures of the Kubernetes tests: an API server over HTTP, a connection to it, and the topwork command."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer
from controlled_cluster import ControlledCluster

from topwork.cli import main
from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect

CLUSTER_VARIABLES = ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the developer's clusters: no KUBECONFIG, no ~/.kube."""
    for name in CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def kubeconfig(api_server: ApiServer, tmp_path: Path) -> Path:
    """kubeconfig of `api_server`, with the namespace team-a."""
    return api_server.kubeconfig(tmp_path / "kubeconfig")


@pytest.fixture
def make_cluster(kubeconfig: Path) -> Callable[..., Cluster]:
    """Function that connects to `api_server`. It accepts the arguments of ClusterSettings; delays are short."""

    def make(**settings: object) -> Cluster:
        defaults: dict[str, Any] = {"kubeconfig": str(kubeconfig), "timeout_seconds": 5.0, "backoff_seconds": 0.01}
        return connect(ClusterSettings(**(defaults | settings)))

    return make


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster()


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> Iterator[ControlledCluster]:
    """A cluster with a reconciler; every test ends with at most one active pod of each node of a run at any time."""
    controlled = ControlledCluster(api_server, cluster)
    yield controlled
    assert controlled.kubernetes.overlapping_pods() == []
    assert controlled.errors == []


@pytest.fixture
def topwork(
    kubeconfig: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Function that runs a topwork command in this process and returns its exit code and output lines."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setattr("sys.argv", ["topwork", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), (captured.out + captured.err).splitlines()

    return run
