"""Logs over connections that break, end and stall: no line is lost or repeated."""

import threading
import time
from collections.abc import Callable
from typing import Any

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Cluster
from topwork.errors import UnavailableError


@pytest.fixture
def pod(api_server: ApiServer) -> str:
    """A pod `p` whose init container `pull` runs and whose container `fine-tune` waits."""
    spec = {"initContainers": [{"name": "pull"}], "containers": [{"name": "fine-tune"}]}
    status = {
        "phase": "Pending",
        "initContainerStatuses": [{"name": "pull", "state": {"running": {}}}],
        "containerStatuses": [{"name": "fine-tune", "state": {"waiting": {"reason": "PodInitializing"}}}],
    }
    api_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec, "status": status})
    return "p"


def terminate(api_server: ApiServer, container: str = "pull") -> None:
    """Set the container to terminated in the status of its pod."""
    state = {"name": container, "state": {"terminated": {"exitCode": 0}}}
    api_server.patch("Pod", "p", {"status": {"initContainerStatuses": [state]}})


def run_later(*steps: Callable[[], object], delay: float = 0.15) -> None:
    """Run steps in a thread, each after a delay in seconds."""

    def run() -> None:
        for step in steps:
            time.sleep(delay)
            step()

    threading.Thread(target=run, daemon=True).start()


def test_lines_have_no_timestamps_by_default(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.append_log(pod, "pull", "first", "", "third: é")
    assert list(cluster.logs(pod, "pull")) == ["first", "", "third: é"]


def test_timestamps_are_included_on_request(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.append_log(pod, "pull", "first", at="2026-01-02T03:04:05.678901234Z")
    assert list(cluster.logs(pod, "pull", timestamps=True)) == ["2026-01-02T03:04:05.678901234Z first"]


def test_timestamp_written_by_the_container_is_kept(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.append_log(pod, "pull", "2026-01-01T00:00:00Z started")
    assert list(cluster.logs(pod, "pull")) == ["2026-01-01T00:00:00Z started"]


def test_tail_and_since_select_lines(api_server: ApiServer, cluster: Cluster, pod: str):
    for second in range(5):
        api_server.append_log(pod, "pull", f"line {second}", at=f"2026-01-02T03:04:0{second}.000000001Z")
    assert list(cluster.logs(pod, "pull", tail=2)) == ["line 3", "line 4"]
    assert list(cluster.logs(pod, "pull", tail=0)) == []
    assert list(cluster.logs(pod, "pull", since="2026-01-02T03:04:03Z")) == ["line 3", "line 4"]


def test_waiting_container_has_no_lines(cluster: Cluster, pod: str):
    assert list(cluster.logs(pod, "fine-tune")) == []
    assert list(cluster.logs(pod, "fine-tune", follow=True)) == []


@pytest.mark.parametrize(
    "status",
    [
        api_statuses.container_waiting("fine-tune", "p", "ContainerCreating"),
        api_statuses.container_waiting("fine-tune", "p", "trying and failing to pull image"),
        api_statuses.bad_request("pod p does not have a host assigned"),
    ],
    ids=["creating", "image", "not scheduled"],
)
def test_pod_that_has_not_started_has_no_lines(
    api_server: ApiServer, cluster: Cluster, pod: str, status: dict[str, Any]
):
    api_server.inject(Fault(status))
    assert list(cluster.logs(pod, "fine-tune")) == []


def test_missing_pod_has_no_lines(cluster: Cluster):
    assert list(cluster.logs("gone", "pull")) == []


def test_following_ends_with_the_container(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.append_log(pod, "pull", "one")
    run_later(lambda: api_server.append_log(pod, "pull", "two"), lambda: terminate(api_server))
    assert list(cluster.logs(pod, "pull", follow=True)) == ["one", "two"]


def test_following_yields_a_line_immediately(api_server: ApiServer, cluster: Cluster, pod: str):
    run_later(lambda: api_server.append_log(pod, "pull", "one"))
    start = time.monotonic()
    assert next(iter(cluster.logs(pod, "pull", follow=True))) == "one"
    assert time.monotonic() - start < 5.0


def test_following_ends_with_the_pod(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.append_log(pod, "pull", "one")
    lines = iter(cluster.logs(pod, "pull", follow=True))
    assert next(lines) == "one"
    api_server.remove("Pod", pod)
    assert list(lines) == []


def write_lines(api_server: ApiServer, pod: str) -> list[str]:
    """Write lines in three different seconds, some with equal text and timestamp, and return them."""
    lines = []
    for second in (5, 6, 7):
        for number in range(4):
            line = f"{second}.{number // 2}"
            api_server.append_log(pod, "pull", line, at=f"2026-01-02T03:04:0{second}.00000000{number // 2}Z")
            lines.append(line)
    return lines


@pytest.mark.parametrize("cut", [0, 10, 33, 34, 35, 150, 300, 400])
@pytest.mark.parametrize("follow", [True, False])
def test_log_cut_at_any_byte_is_resumed_without_loss(
    api_server: ApiServer, cluster: Cluster, pod: str, cut: int, follow: bool
):
    lines = write_lines(api_server, pod)
    api_server.inject(Fault(cut_after_bytes=cut, path="/log"), times=3)
    terminate(api_server)
    assert list(cluster.logs(pod, "pull", follow=follow)) == lines


def test_log_with_another_time_zone_is_resumed(api_server: ApiServer, cluster: Cluster, pod: str):
    for number in range(4):
        api_server.append_log(pod, "pull", f"line {number}", at=f"2026-01-02T03:04:05.00000000{number}+02:00")
    api_server.inject(Fault(cut_after_bytes=100, path="/log"))
    terminate(api_server)
    assert list(cluster.logs(pod, "pull", follow=True)) == [f"line {number}" for number in range(4)]
    assert api_server.requests[1].query["sinceTime"] == "2026-01-02T03:04:05+02:00"


def test_lines_before_the_tail_stay_excluded_after_resuming(api_server: ApiServer, cluster: Cluster, pod: str):
    for number in range(4):
        api_server.append_log(pod, "pull", f"line {number}", at=f"2026-01-02T03:04:05.00000000{number}Z")
    api_server.inject(Fault(cut_after_bytes=60, path="/log"))
    terminate(api_server)
    assert list(cluster.logs(pod, "pull", follow=True, tail=2)) == ["line 2", "line 3"]
    tails = [request.query.get("tailLines") for request in api_server.requests if request.path.endswith("/log")]
    assert tails[:2] == ["2", None]


def test_stream_that_ends_before_its_container_is_resumed(api_server: ApiServer, cluster: Cluster, pod: str):
    """API servers and kubelets end streams when they rotate a log or close old connections."""
    api_server.append_log(pod, "pull", "one")
    api_server.inject(Fault(body=b"2026-01-02T03:04:05.000000001Z zero\n", path="/log"))
    run_later(lambda: api_server.append_log(pod, "pull", "two"), lambda: terminate(api_server))
    assert list(cluster.logs(pod, "pull", follow=True)) == ["zero", "one", "two"]


def test_lines_between_the_ends_of_stream_and_container_are_not_lost(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.inject(Fault(body=b"2026-01-02T03:04:05.000000001Z one\n", path="/log"))
    api_server.append_log(pod, "pull", "one", at="2026-01-02T03:04:05.000000001Z")
    api_server.append_log(pod, "pull", "two", at="2026-01-02T03:04:05.000000002Z")
    terminate(api_server)
    assert list(cluster.logs(pod, "pull", follow=True)) == ["one", "two"]


def test_following_waits_for_a_silent_container(api_server: ApiServer, make_cluster: Callable[..., Cluster], pod: str):
    api_server.append_log(pod, "pull", "one")
    run_later(lambda: api_server.append_log(pod, "pull", "two"), lambda: terminate(api_server), delay=1.2)
    assert list(make_cluster(stream_seconds=0.3, attempts=2).logs(pod, "pull", follow=True)) == ["one", "two"]


def test_dead_connection_is_detected(api_server: ApiServer, make_cluster: Callable[..., Cluster], pod: str):
    api_server.append_log(pod, "pull", "one", "two", at="2026-01-02T03:04:05.000000001Z")
    api_server.inject(Fault(stall_after_bytes=40, path="/log"))
    terminate(api_server)
    assert list(make_cluster(stream_seconds=0.3).logs(pod, "pull", follow=True)) == ["one", "two"]


@pytest.mark.parametrize(
    "fault",
    [Fault(api_statuses.internal_error()), Fault(api_statuses.too_many_requests()), Fault(reset=True)],
    ids=["500", "429", "reset"],
)
def test_transient_error_is_retried(api_server: ApiServer, cluster: Cluster, pod: str, fault: Fault):
    api_server.append_log(pod, "pull", "one")
    api_server.inject(fault, times=3)
    assert list(cluster.logs(pod, "pull")) == ["one"]


def test_unreachable_node_raises_unavailable_error(
    api_server: ApiServer, make_cluster: Callable[..., Cluster], pod: str
):
    message = (
        'Get "https://10.0.0.9:10250/containerLogs/team-a/p/pull": dial tcp 10.0.0.9:10250: connect: no route to host'
    )
    api_server.inject(Fault(api_statuses.status(500, "", message)), times=9)
    with pytest.raises(UnavailableError) as caught:
        list(make_cluster(attempts=2).logs(pod, "pull"))
    assert str(caught.value) == (
        f"{api_server.url} could not read the log of Pod p in team-a (500: {message}). Try again later."
    )


def test_line_without_a_timestamp_is_unchanged(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.inject(Fault(body=b"unable to retrieve container logs for containerd://1234"))
    assert list(cluster.logs(pod, "pull")) == ["unable to retrieve container logs for containerd://1234"]


def test_invalid_utf8_is_replaced(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.inject(Fault(body=b"\xff\xfe caf\xc3\xa9\nnext\n"))
    assert list(cluster.logs(pod, "pull")) == ["�� café", "next"]
