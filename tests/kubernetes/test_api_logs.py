"""Reading logs over connections that break, end and stall: no line lost, none twice."""

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
    """A pod `p` with an init container `pull` that runs and a container `fine-tune` that waits for it."""
    spec = {"initContainers": [{"name": "pull"}], "containers": [{"name": "fine-tune"}]}
    status = {
        "phase": "Pending",
        "initContainerStatuses": [{"name": "pull", "state": {"running": {}}}],
        "containerStatuses": [{"name": "fine-tune", "state": {"waiting": {"reason": "PodInitializing"}}}],
    }
    api_server.put({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec, "status": status})
    return "p"


def ended(api_server: ApiServer, container: str = "pull") -> None:
    """The container ends, as the cluster tells it."""
    state = {"name": container, "state": {"terminated": {"exitCode": 0}}}
    api_server.patch("Pod", "p", {"status": {"initContainerStatuses": [state]}})


def later(*steps: Callable[[], object], pause: float = 0.15) -> None:
    def play() -> None:
        for step in steps:
            time.sleep(pause)
            step()

    threading.Thread(target=play, daemon=True).start()


def test_lines_come_without_their_times(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.log(pod, "pull", "first", "", "third: é")
    assert list(cluster.logs(pod, "pull")) == ["first", "", "third: é"]


def test_times_are_shown_where_they_are_asked_for(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.log(pod, "pull", "first", at="2026-01-02T03:04:05.678901234Z")
    assert list(cluster.logs(pod, "pull", timestamps=True)) == ["2026-01-02T03:04:05.678901234Z first"]


def test_a_line_that_begins_with_a_time_of_its_own_keeps_it(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.log(pod, "pull", "2026-01-01T00:00:00Z started")
    assert list(cluster.logs(pod, "pull")) == ["2026-01-01T00:00:00Z started"]


def test_the_last_lines_and_those_since_a_time(api_server: ApiServer, cluster: Cluster, pod: str):
    for second in range(5):
        api_server.log(pod, "pull", f"line {second}", at=f"2026-01-02T03:04:0{second}.000000001Z")
    assert list(cluster.logs(pod, "pull", tail=2)) == ["line 3", "line 4"]
    assert list(cluster.logs(pod, "pull", tail=0)) == []
    assert list(cluster.logs(pod, "pull", since="2026-01-02T03:04:03Z")) == ["line 3", "line 4"]


def test_a_container_that_waits_has_no_lines(cluster: Cluster, pod: str):
    assert list(cluster.logs(pod, "fine-tune")) == []
    assert list(cluster.logs(pod, "fine-tune", follow=True)) == []


@pytest.mark.parametrize(
    "status",
    [
        api_statuses.waiting("fine-tune", "p", "ContainerCreating"),
        api_statuses.waiting("fine-tune", "p", "trying and failing to pull image"),
        api_statuses.bad_request("pod p does not have a host assigned"),
    ],
    ids=["creating", "image", "not scheduled"],
)
def test_a_pod_that_has_not_begun_has_no_lines(
    api_server: ApiServer, cluster: Cluster, pod: str, status: dict[str, Any]
):
    api_server.plant(Fault(status))
    assert list(cluster.logs(pod, "fine-tune")) == []


def test_a_pod_that_is_gone_has_no_lines(cluster: Cluster):
    assert list(cluster.logs("gone", "pull")) == []


def test_following_ends_with_the_container(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.log(pod, "pull", "one")
    later(lambda: api_server.log(pod, "pull", "two"), lambda: ended(api_server))
    assert list(cluster.logs(pod, "pull", follow=True)) == ["one", "two"]


def test_following_shows_a_line_at_once(api_server: ApiServer, cluster: Cluster, pod: str):
    later(lambda: api_server.log(pod, "pull", "one"))
    began = time.monotonic()
    assert next(iter(cluster.logs(pod, "pull", follow=True))) == "one"
    assert time.monotonic() - began < 5.0


def test_following_ends_with_the_pod(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.log(pod, "pull", "one")
    lines = iter(cluster.logs(pod, "pull", follow=True))
    assert next(lines) == "one"
    api_server.remove("Pod", pod)
    assert list(lines) == []


def many(api_server: ApiServer, pod: str) -> list[str]:
    """Lines of three seconds, some alike to the last digit of their time."""
    lines = []
    for second in (5, 6, 7):
        for number in range(4):
            line = f"{second}.{number // 2}"
            api_server.log(pod, "pull", line, at=f"2026-01-02T03:04:0{second}.00000000{number // 2}Z")
            lines.append(line)
    return lines


@pytest.mark.parametrize("cut", [0, 10, 33, 34, 35, 150, 300, 400])
@pytest.mark.parametrize("follow", [True, False])
def test_a_log_that_breaks_off_anywhere_goes_on_there(
    api_server: ApiServer, cluster: Cluster, pod: str, cut: int, follow: bool
):
    lines = many(api_server, pod)
    api_server.plant(Fault(cut_after=cut, path="/log"), times=3)
    ended(api_server)
    assert list(cluster.logs(pod, "pull", follow=follow)) == lines


def test_a_log_with_another_time_zone_goes_on_where_it_broke_off(api_server: ApiServer, cluster: Cluster, pod: str):
    for number in range(4):
        api_server.log(pod, "pull", f"line {number}", at=f"2026-01-02T03:04:05.00000000{number}+02:00")
    api_server.plant(Fault(cut_after=100, path="/log"))
    ended(api_server)
    assert list(cluster.logs(pod, "pull", follow=True)) == [f"line {number}" for number in range(4)]
    assert api_server.requests[1].query["sinceTime"] == "2026-01-02T03:04:05+02:00"


def test_lines_before_the_last_ones_stay_out_when_a_log_goes_on(api_server: ApiServer, cluster: Cluster, pod: str):
    for number in range(4):
        api_server.log(pod, "pull", f"line {number}", at=f"2026-01-02T03:04:05.00000000{number}Z")
    api_server.plant(Fault(cut_after=60, path="/log"))
    ended(api_server)
    assert list(cluster.logs(pod, "pull", follow=True, tail=2)) == ["line 2", "line 3"]
    asked = [each.query.get("tailLines") for each in api_server.requests if each.path.endswith("/log")]
    assert asked[:2] == ["2", None]


def test_a_stream_that_ends_before_its_container_is_taken_up(api_server: ApiServer, cluster: Cluster, pod: str):
    """As API servers and kubelets do when a log is rotated or a connection is old."""
    api_server.log(pod, "pull", "one")
    api_server.plant(Fault(body=b"2026-01-02T03:04:05.000000001Z zero\n", path="/log"))
    later(lambda: api_server.log(pod, "pull", "two"), lambda: ended(api_server))
    assert list(cluster.logs(pod, "pull", follow=True)) == ["zero", "one", "two"]


def test_what_comes_between_the_end_of_a_stream_and_that_of_its_container_is_not_lost(
    api_server: ApiServer, cluster: Cluster, pod: str
):
    api_server.plant(Fault(body=b"2026-01-02T03:04:05.000000001Z one\n", path="/log"))
    api_server.log(pod, "pull", "one", at="2026-01-02T03:04:05.000000001Z")
    api_server.log(pod, "pull", "two", at="2026-01-02T03:04:05.000000002Z")
    ended(api_server)
    assert list(cluster.logs(pod, "pull", follow=True)) == ["one", "two"]


def test_a_quiet_container_is_waited_for(api_server: ApiServer, make_cluster: Callable[..., Cluster], pod: str):
    api_server.log(pod, "pull", "one")
    later(lambda: api_server.log(pod, "pull", "two"), lambda: ended(api_server), pause=1.2)
    assert list(make_cluster(stream_seconds=0.3, attempts=2).logs(pod, "pull", follow=True)) == ["one", "two"]


def test_a_dead_connection_is_noticed(api_server: ApiServer, make_cluster: Callable[..., Cluster], pod: str):
    api_server.log(pod, "pull", "one", "two", at="2026-01-02T03:04:05.000000001Z")
    api_server.plant(Fault(stall_after=40, path="/log"))
    ended(api_server)
    assert list(make_cluster(stream_seconds=0.3).logs(pod, "pull", follow=True)) == ["one", "two"]


@pytest.mark.parametrize(
    "fault",
    [Fault(api_statuses.internal()), Fault(api_statuses.too_many()), Fault(reset=True)],
    ids=["500", "429", "reset"],
)
def test_what_passes_is_tried_again(api_server: ApiServer, cluster: Cluster, pod: str, fault: Fault):
    api_server.log(pod, "pull", "one")
    api_server.plant(fault, times=3)
    assert list(cluster.logs(pod, "pull")) == ["one"]


def test_a_node_that_does_not_answer_is_unavailable(
    api_server: ApiServer, make_cluster: Callable[..., Cluster], pod: str
):
    why = 'Get "https://10.0.0.9:10250/containerLogs/team-a/p/pull": dial tcp 10.0.0.9:10250: connect: no route to host'
    api_server.plant(Fault(api_statuses.status(500, "", why)), times=9)
    with pytest.raises(UnavailableError) as caught:
        list(make_cluster(attempts=2).logs(pod, "pull"))
    assert str(caught.value) == (
        f"{api_server.url} could not read the log of Pod p in team-a (500: {why}). Try again later."
    )


def test_a_line_without_a_time_is_shown_as_it_is(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.plant(Fault(body=b"unable to retrieve container logs for containerd://1234"))
    assert list(cluster.logs(pod, "pull")) == ["unable to retrieve container logs for containerd://1234"]


def test_bytes_that_are_no_text_do_not_end_a_log(api_server: ApiServer, cluster: Cluster, pod: str):
    api_server.plant(Fault(body=b"\xff\xfe caf\xc3\xa9\nnext\n"))
    assert list(cluster.logs(pod, "pull")) == ["�� café", "next"]
