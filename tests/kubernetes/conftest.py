"""What the tests of the cluster share: an API server over HTTP, and a connection to it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import ApiServer

from topwork.cli import main
from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect

CLUSTER_VARIABLES = ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT")


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster of the developer is ever reached from here: no KUBECONFIG, no ~/.kube."""
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
    """Connect to `api_server`; keyword arguments are those of ClusterSettings. Pauses are short."""

    def make(**settings: object) -> Cluster:
        stated = {"kubeconfig": str(kubeconfig), "timeout_seconds": 5.0, "pause_seconds": 0.01, **settings}
        return connect(ClusterSettings(**stated))

    return make


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster()


@pytest.fixture
def topwork(
    kubeconfig: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Call the command here; its exit code and the lines that it printed."""

    def call(*words: object) -> tuple[int, list[str]]:
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setattr("sys.argv", ["topwork", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), (captured.out + captured.err).splitlines()

    return call
