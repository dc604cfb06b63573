"""Watching objects over connections that break, end, stall and forget."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.edge.kubernetes import Change, Cluster
from topwork.errors import SettingError, UnavailableError


def pod(name: str, phase: str = "Pending", **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **metadata}, "status": {"phase": phase}}


def told(changes: Iterator[Change]) -> list[str]:
    return [f"{type_} {found['metadata']['name']} {found['status']['phase']}" for type_, found in changes]


class Play(threading.Thread):
    """Does things to the server one after another, a moment apart, while a test watches."""

    def __init__(self, *steps: Callable[[], object], pause: float = 0.15) -> None:
        super().__init__(daemon=True)
        self.steps, self.pause = steps, pause
        self.start()

    def run(self) -> None:
        for step in self.steps:
            time.sleep(self.pause)
            step()


def test_what_is_there_comes_first_and_then_what_happens(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    Play(
        lambda: api_server.put(pod("b")),
        lambda: api_server.patch("Pod", "a", {"status": {"phase": "Running"}}),
        lambda: api_server.remove("Pod", "b"),
    )
    assert told(cluster.watch("Pod", seconds=0.8)) == [
        "ADDED a Pending",
        "ADDED b Pending",
        "MODIFIED a Running",
        "DELETED b Pending",
    ]


def test_a_change_is_told_at_once(api_server: ApiServer, cluster: Cluster):
    Play(lambda: api_server.put(pod("a")))
    began = time.monotonic()
    assert next(iter(cluster.watch("Pod", seconds=20))).object["metadata"]["name"] == "a"
    assert time.monotonic() - began < 1.0


def test_a_watch_ends_when_its_time_is_over(cluster: Cluster):
    began = time.monotonic()
    assert told(cluster.watch("Pod", seconds=0.3)) == []
    assert 0.3 <= time.monotonic() - began < 1.0


def test_selectors_hold_and_what_no_longer_meets_them_is_deleted(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a", labels={"job": "cats"}))
    api_server.put(pod("b", labels={"job": "dogs"}))
    Play(
        lambda: api_server.patch("Pod", "b", {"status": {"phase": "Running"}}),
        lambda: api_server.patch("Pod", "a", {"metadata": {"labels": {"job": None}}}),
    )
    assert told(cluster.watch("Pod", labels="job=cats", seconds=0.6)) == ["ADDED a Pending", "DELETED a Pending"]


def test_a_stream_that_ends_goes_on_from_its_version(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    """Streams end every `stream_seconds`; nothing is listed anew."""
    api_server.put(pod("a"))
    Play(lambda: api_server.patch("Pod", "a", {"status": {"phase": "Running"}}), pause=1.5)
    changes = told(make_cluster(stream_seconds=1.0).watch("Pod", seconds=2.5))
    assert changes == ["ADDED a Pending", "MODIFIED a Running"]
    asked = [(each.query.get("watch"), each.query.get("resourceVersion")) for each in api_server.requests]
    first = api_server.requests[1].query["resourceVersion"]
    assert asked[0] == (None, None)
    assert asked[1:3] == [("true", first)] * 2
    assert len(asked) == 4


@pytest.mark.parametrize("cut", [0, 1, 150, 400])
def test_a_stream_that_breaks_off_anywhere_is_taken_up_without_loss(api_server: ApiServer, cluster: Cluster, cut: int):
    api_server.put(pod("a"))
    api_server.plant(Fault(), Fault(cut_after=cut, path="/pods"), Fault(cut_after=cut, path="/pods"))
    Play(
        lambda: api_server.patch("Pod", "a", {"status": {"phase": "Running"}}),
        lambda: api_server.patch("Pod", "a", {"status": {"phase": "Succeeded"}}),
        lambda: api_server.put(pod("b")),
    )
    assert told(cluster.watch("Pod", seconds=1.0)) == [
        "ADDED a Pending",
        "MODIFIED a Running",
        "MODIFIED a Succeeded",
        "ADDED b Pending",
    ]


def test_a_version_that_is_forgotten_is_listed_anew_and_what_went_meanwhile_is_deleted(
    api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    api_server.put(pod("a"))
    api_server.put(pod("b"))
    api_server.plant(Fault(), Fault(stall_after=0, path="/pods"))

    def meanwhile() -> None:
        api_server.remove("Pod", "a")
        api_server.put(pod("c"))
        api_server.compact()

    Play(meanwhile)
    cluster = make_cluster(stream_seconds=0.4, timeout_seconds=0.2)
    assert told(cluster.watch("Pod", seconds=1.5)) == [
        "ADDED a Pending",
        "ADDED b Pending",
        "DELETED a Pending",
        "ADDED b Pending",
        "ADDED c Pending",
    ]


def test_410_as_the_answer_is_listed_anew(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.plant(Fault(), Fault(api_statuses.expired()))
    assert told(cluster.watch("Pod", seconds=0.5)) == ["ADDED a Pending", "ADDED a Pending"]
    assert [each.code for each in api_server.requests] == [200, 410, 200, 200]


def test_a_bookmark_moves_the_version_on(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    Play(api_server.bookmark, api_server.compact)
    assert told(make_cluster(stream_seconds=1.0).watch("Pod", seconds=1.6)) == []
    assert [each.query.get("watch") for each in api_server.requests] == [None, "true", "true"]


def test_a_stream_that_falls_silent_ends_with_the_watch(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.plant(Fault(), Fault(stall_after=0, path="/pods"), times=1)
    began = time.monotonic()
    assert told(cluster.watch("Pod", seconds=0.5)) == ["ADDED a Pending"]
    assert time.monotonic() - began < 1.0


def test_a_stream_that_falls_silent_after_a_change_ends_with_the_watch(api_server: ApiServer, cluster: Cluster):
    """The wait for the next bytes grows shorter with every change, or the watch would last almost twice as long."""
    api_server.plant(Fault(), Fault(stall_after=700, path="/pods"))
    Play(lambda: api_server.put(pod("a")), lambda: api_server.put(pod("b", "x" * 600)), pause=0.4)
    began = time.monotonic()
    assert told(cluster.watch("Pod", seconds=1.0)) == ["ADDED a Pending"]
    assert time.monotonic() - began < 1.5


def test_a_dead_connection_is_noticed_and_taken_up(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    api_server.plant(Fault(), Fault(stall_after=0, path="/pods"))
    Play(lambda: api_server.put(pod("a")))
    cluster = make_cluster(stream_seconds=0.3, timeout_seconds=0.3)
    assert told(cluster.watch("Pod", seconds=1.5)) == ["ADDED a Pending"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(api_statuses.too_many()), id="429"),
        pytest.param(Fault(api_statuses.unavailable()), id="503"),
        pytest.param(Fault(reset=True), id="reset"),
        pytest.param(Fault(body=b"<html>\n"), id="garbage"),
        pytest.param(
            Fault(body=b'{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd"}}\n'), id="ERROR"
        ),
    ],
)
def test_what_passes_is_waited_for(api_server: ApiServer, cluster: Cluster, fault: Fault):
    api_server.plant(Fault())
    api_server.plant(fault, times=3)
    Play(lambda: api_server.put(pod("a")), pause=0.4)
    assert told(cluster.watch("Pod", seconds=1.0)) == ["ADDED a Pending"]


def test_a_server_that_stays_away_is_unavailable(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    api_server.plant(Fault())
    api_server.plant(Fault(api_statuses.unavailable()), times=9)
    with pytest.raises(UnavailableError) as caught:
        list(make_cluster(attempts=3).watch("Pod", seconds=5))
    assert str(caught.value) == (
        f"{api_server.url} could not watch pods in team-a (503: the server is currently unable to handle the request). "
        "Try again later."
    )
    assert len(api_server.requests) == 4


def test_a_role_that_is_missing_is_told(api_server: ApiServer, cluster: Cluster):
    api_server.plant(Fault(), Fault(api_statuses.rbac("watch", "pods", "team-a")))
    with pytest.raises(SettingError, match="alice may not watch pods in the namespace team-a"):
        list(cluster.watch("Pod", seconds=5))


def test_a_login_that_ends_during_a_watch_is_told(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    Play(lambda: setattr(api_server.settings, "token", "another"))
    with pytest.raises(SettingError, match=r"does not accept the context tests \(401: Unauthorized\)"):
        list(make_cluster(stream_seconds=1.0).watch("Pod", seconds=5))


def test_a_caller_who_leaves_early_closes_the_connection(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    changes = cluster.watch("Pod", seconds=30)
    next(changes)
    changes.close()  # type: ignore[attr-defined]
    assert len(api_server.requests) == 1
