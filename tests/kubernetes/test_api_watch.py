"""Watching objects over connections that break, end, stall and forget."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Change, Cluster
from topwork.errors import SettingError, UnavailableError

PATIENCE_SECONDS = 60.0


def pod(name: str, phase: str = "Pending", **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **metadata}, "status": {"phase": phase}}


def told(changes: Iterable[Change]) -> list[str]:
    return [f"{type_} {found['metadata']['name']} {found['status']['phase']}" for type_, found in changes]


def next_of(changes: Iterator[Change], count: int = 1) -> list[str]:
    """The next changes, however long they take."""
    return told(islice(changes, count))


def test_what_is_there_comes_first_and_then_what_happens(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    changes = cluster.watch("Pod", seconds=PATIENCE_SECONDS)
    assert next_of(changes) == ["ADDED a Pending"]
    api_server.put(pod("b"))
    api_server.patch("Pod", "a", {"status": {"phase": "Running"}})
    api_server.remove("Pod", "b")
    assert next_of(changes, 3) == ["ADDED b Pending", "MODIFIED a Running", "DELETED b Pending"]


def test_a_change_is_told_at_once(api_server: ApiServer, cluster: Cluster):
    threading.Timer(0.3, api_server.put, (pod("a"),)).start()
    began = time.monotonic()
    assert next_of(cluster.watch("Pod", seconds=PATIENCE_SECONDS)) == ["ADDED a Pending"]
    assert time.monotonic() - began < 5.0


def test_a_watch_ends_when_its_time_is_over(cluster: Cluster):
    began = time.monotonic()
    assert told(cluster.watch("Pod", seconds=0.3)) == []
    assert 0.3 <= time.monotonic() - began < 5.0


def test_selectors_hold_and_what_no_longer_meets_them_is_deleted(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a", labels={"job": "cats"}))
    api_server.put(pod("b", labels={"job": "dogs"}))
    changes = cluster.watch("Pod", labels="job=cats", seconds=PATIENCE_SECONDS)
    assert next_of(changes) == ["ADDED a Pending"]
    api_server.patch("Pod", "b", {"status": {"phase": "Running"}})
    api_server.patch("Pod", "a", {"metadata": {"labels": {"job": None}}})
    assert next_of(changes) == ["DELETED a Pending"]


def test_a_stream_that_ends_goes_on_from_its_version(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    """Streams end every `stream_seconds`; nothing is listed anew."""
    api_server.put(pod("a"))
    changes = make_cluster(stream_seconds=1.0).watch("Pod", seconds=PATIENCE_SECONDS)
    assert next_of(changes) == ["ADDED a Pending"]
    threading.Timer(1.5, api_server.patch, ("Pod", "a", {"status": {"phase": "Running"}})).start()
    assert next_of(changes) == ["MODIFIED a Running"]
    asked = [(each.query.get("watch"), each.query.get("timeoutSeconds")) for each in api_server.requests]
    assert asked == [(None, None), ("true", "1"), ("true", "1")]
    assert len({each.query.get("resourceVersion") for each in api_server.requests[1:]}) == 1


@pytest.mark.parametrize("cut", [0, 1, 150, 400])
def test_a_stream_that_breaks_off_anywhere_is_taken_up_without_loss(api_server: ApiServer, cluster: Cluster, cut: int):
    api_server.put(pod("a"))
    api_server.plant(Fault(), Fault(cut_after=cut, path="/pods"), Fault(cut_after=cut, path="/pods"))
    changes = cluster.watch("Pod", seconds=PATIENCE_SECONDS)
    assert next_of(changes) == ["ADDED a Pending"]
    api_server.patch("Pod", "a", {"status": {"phase": "Running"}})
    api_server.patch("Pod", "a", {"status": {"phase": "Succeeded"}})
    api_server.put(pod("b"))
    assert next_of(changes, 3) == ["MODIFIED a Running", "MODIFIED a Succeeded", "ADDED b Pending"]


def test_a_version_that_is_forgotten_is_listed_anew_and_what_went_meanwhile_is_deleted(
    api_server: ApiServer, cluster: Cluster
):
    api_server.put(pod("a"))
    api_server.put(pod("b"))
    changes = cluster.watch("Pod", seconds=PATIENCE_SECONDS)
    assert next_of(changes, 2) == ["ADDED a Pending", "ADDED b Pending"]
    api_server.remove("Pod", "a")
    api_server.put(pod("c"))
    api_server.compact()
    assert next_of(changes, 3) == ["DELETED a Pending", "ADDED b Pending", "ADDED c Pending"]


def test_410_as_the_answer_is_listed_anew(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.plant(Fault(), Fault(api_statuses.expired()))
    changes = cluster.watch("Pod", seconds=PATIENCE_SECONDS)
    assert next_of(changes, 2) == ["ADDED a Pending", "ADDED a Pending"]
    assert [each.code for each in api_server.requests] == [200, 410, 200]


def test_a_bookmark_moves_the_version_on(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    """What happened to other objects is forgotten, and nothing is listed anew for it."""
    changes = make_cluster(stream_seconds=1.0).watch("Pod", seconds=PATIENCE_SECONDS)
    threading.Timer(0.3, api_server.bookmark).start()
    threading.Timer(0.6, api_server.compact).start()
    threading.Timer(2.5, api_server.put, (pod("a"),)).start()
    assert next_of(changes) == ["ADDED a Pending"]
    asked = [each.query.get("watch") for each in api_server.requests]
    assert asked[0] is None
    assert set(asked[1:]) == {"true"}


def test_a_stream_that_falls_silent_ends_with_the_watch(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.plant(Fault(), Fault(stall_after=0, path="/pods"))
    began = time.monotonic()
    assert told(cluster.watch("Pod", seconds=0.5)) == ["ADDED a Pending"]
    assert time.monotonic() - began < 5.0


def test_a_stream_that_falls_silent_after_a_change_ends_with_the_watch(
    api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    """The wait for the next bytes grows shorter with every change, or the watch would last almost twice as long."""
    api_server.plant(Fault(), Fault(stall_after=700, path="/pods"))
    threading.Timer(7.0, api_server.put, (pod("a"),)).start()
    threading.Timer(7.5, api_server.put, (pod("b", "x" * 600),)).start()
    began = time.monotonic()
    assert told(make_cluster(timeout_seconds=30.0).watch("Pod", seconds=10.0)) == ["ADDED a Pending"]
    assert time.monotonic() - began < 14.0


def test_a_dead_connection_is_noticed_and_taken_up(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    api_server.plant(Fault(), Fault(stall_after=0, path="/pods"))
    changes = make_cluster(stream_seconds=0.3, timeout_seconds=0.5).watch("Pod", seconds=PATIENCE_SECONDS)
    threading.Timer(0.2, api_server.put, (pod("a"),)).start()
    assert next_of(changes) == ["ADDED a Pending"]


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
    threading.Timer(0.5, api_server.put, (pod("a"),)).start()
    assert next_of(cluster.watch("Pod", seconds=PATIENCE_SECONDS)) == ["ADDED a Pending"]
    assert len(api_server.requests) == 5


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
    api_server.put(pod("a"))
    changes = make_cluster().watch("Pod", seconds=PATIENCE_SECONDS)
    assert next_of(changes) == ["ADDED a Pending"]
    api_server.settings.token = "another"
    with pytest.raises(SettingError, match=r"does not accept the context tests \(401: Unauthorized\)"):
        next(changes)


def test_a_caller_who_leaves_early_closes_the_connection(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    changes = cluster.watch("Pod", seconds=30)
    next(changes)
    changes.close()  # type: ignore[attr-defined]
    assert len(api_server.requests) == 1
