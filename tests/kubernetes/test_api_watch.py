"""Watches over connections that break, end and stall, and after expired versions."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault

from topwork.clients.kubernetes.cluster import Cluster, WatchEvent
from topwork.errors import SettingError, UnavailableError

TIMEOUT_SECONDS = 60.0


def pod(name: str, phase: str = "Pending", **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **metadata}, "status": {"phase": phase}}


def describe(events: Iterable[WatchEvent]) -> list[str]:
    return [f"{type_} {obj['metadata']['name']} {obj['status']['phase']}" for type_, obj in events]


def next_events(events: Iterator[WatchEvent], count: int = 1) -> list[str]:
    """Wait for the next events and describe them."""
    return describe(islice(events, count))


def test_watch_yields_existing_objects_and_then_changes(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    events = cluster.watch("Pod", seconds=TIMEOUT_SECONDS)
    assert next_events(events) == ["ADDED a Pending"]
    api_server.put(pod("b"))
    api_server.patch("Pod", "a", {"status": {"phase": "Running"}})
    api_server.remove("Pod", "b")
    assert next_events(events, 3) == ["ADDED b Pending", "MODIFIED a Running", "DELETED b Pending"]


def test_change_is_yielded_immediately(api_server: ApiServer, cluster: Cluster):
    threading.Timer(0.3, api_server.put, (pod("a"),)).start()
    start = time.monotonic()
    assert next_events(cluster.watch("Pod", seconds=TIMEOUT_SECONDS)) == ["ADDED a Pending"]
    assert time.monotonic() - start < 5.0


def test_watch_ends_after_its_duration(cluster: Cluster):
    start = time.monotonic()
    assert describe(cluster.watch("Pod", seconds=0.3)) == []
    assert 0.3 <= time.monotonic() - start < 5.0


def test_object_that_no_longer_matches_the_selector_is_deleted(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a", labels={"job": "cats"}))
    api_server.put(pod("b", labels={"job": "dogs"}))
    events = cluster.watch("Pod", labels="job=cats", seconds=TIMEOUT_SECONDS)
    assert next_events(events) == ["ADDED a Pending"]
    api_server.patch("Pod", "b", {"status": {"phase": "Running"}})
    api_server.patch("Pod", "a", {"metadata": {"labels": {"job": None}}})
    assert next_events(events) == ["DELETED a Pending"]


def test_ended_stream_is_resumed_from_its_version(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    """Streams end every `stream_seconds`; the objects are not listed again."""
    api_server.put(pod("a"))
    events = make_cluster(stream_seconds=1.0).watch("Pod", seconds=TIMEOUT_SECONDS)
    assert next_events(events) == ["ADDED a Pending"]
    threading.Timer(1.5, api_server.patch, ("Pod", "a", {"status": {"phase": "Running"}})).start()
    assert next_events(events) == ["MODIFIED a Running"]
    queries = [(request.query.get("watch"), request.query.get("timeoutSeconds")) for request in api_server.requests]
    assert queries == [(None, None), ("true", "1"), ("true", "1")]
    assert len({request.query.get("resourceVersion") for request in api_server.requests[1:]}) == 1


@pytest.mark.parametrize("cut", [0, 1, 150, 400])
def test_stream_cut_at_any_byte_is_resumed_without_loss(api_server: ApiServer, cluster: Cluster, cut: int):
    api_server.put(pod("a"))
    api_server.inject(Fault(), Fault(cut_after_bytes=cut, path="/pods"), Fault(cut_after_bytes=cut, path="/pods"))
    events = cluster.watch("Pod", seconds=TIMEOUT_SECONDS)
    assert next_events(events) == ["ADDED a Pending"]
    api_server.patch("Pod", "a", {"status": {"phase": "Running"}})
    api_server.patch("Pod", "a", {"status": {"phase": "Succeeded"}})
    api_server.put(pod("b"))
    assert next_events(events, 3) == ["MODIFIED a Running", "MODIFIED a Succeeded", "ADDED b Pending"]


def test_expired_version_lists_again_and_reports_deleted_objects(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.put(pod("b"))
    events = cluster.watch("Pod", seconds=TIMEOUT_SECONDS)
    assert next_events(events, 2) == ["ADDED a Pending", "ADDED b Pending"]
    api_server.remove("Pod", "a")
    api_server.put(pod("c"))
    api_server.compact()
    assert next_events(events, 3) == ["DELETED a Pending", "ADDED b Pending", "ADDED c Pending"]


def test_status_410_lists_again(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.inject(Fault(), Fault(api_statuses.expired()))
    events = cluster.watch("Pod", seconds=TIMEOUT_SECONDS)
    assert next_events(events, 2) == ["ADDED a Pending", "ADDED a Pending"]
    assert [request.code for request in api_server.requests] == [200, 410, 200]


def test_bookmark_advances_the_version(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    """Versions before the bookmark expire, and the objects are not listed again."""
    events = make_cluster(stream_seconds=1.0).watch("Pod", seconds=TIMEOUT_SECONDS)
    threading.Timer(0.3, api_server.send_bookmark).start()
    threading.Timer(0.6, api_server.compact).start()
    threading.Timer(2.5, api_server.put, (pod("a"),)).start()
    assert next_events(events) == ["ADDED a Pending"]
    queries = [request.query.get("watch") for request in api_server.requests]
    assert queries[0] is None
    assert set(queries[1:]) == {"true"}


def test_stalled_stream_ends_with_the_watch(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    api_server.inject(Fault(), Fault(stall_after_bytes=0, path="/pods"))
    start = time.monotonic()
    assert describe(cluster.watch("Pod", seconds=0.5)) == ["ADDED a Pending"]
    assert time.monotonic() - start < 5.0


def test_stream_stalled_after_a_change_ends_with_the_watch(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    """Each change shortens the read timeout; otherwise the watch would last almost twice as long."""
    api_server.inject(Fault(), Fault(stall_after_bytes=700, path="/pods"))
    threading.Timer(7.0, api_server.put, (pod("a"),)).start()
    threading.Timer(7.5, api_server.put, (pod("b", "x" * 600),)).start()
    start = time.monotonic()
    assert describe(make_cluster(timeout_seconds=30.0).watch("Pod", seconds=10.0)) == ["ADDED a Pending"]
    assert time.monotonic() - start < 14.0


def test_dead_connection_is_detected_and_resumed(api_server: ApiServer, make_cluster: Callable[..., Cluster]):
    api_server.inject(Fault(), Fault(stall_after_bytes=0, path="/pods"))
    events = make_cluster(stream_seconds=0.3, timeout_seconds=0.5).watch("Pod", seconds=TIMEOUT_SECONDS)
    threading.Timer(0.2, api_server.put, (pod("a"),)).start()
    assert next_events(events) == ["ADDED a Pending"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(api_statuses.too_many_requests()), id="429"),
        pytest.param(Fault(api_statuses.service_unavailable()), id="503"),
        pytest.param(Fault(reset=True), id="reset"),
        pytest.param(Fault(body=b"<html>\n"), id="not JSON"),
        pytest.param(
            Fault(body=b'{"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "etcd"}}\n'), id="ERROR"
        ),
    ],
)
def test_transient_error_is_retried(api_server: ApiServer, cluster: Cluster, fault: Fault):
    api_server.inject(Fault())
    api_server.inject(fault, times=3)
    threading.Timer(0.5, api_server.put, (pod("a"),)).start()
    assert next_events(cluster.watch("Pod", seconds=TIMEOUT_SECONDS)) == ["ADDED a Pending"]
    assert len(api_server.requests) == 5


def test_persistent_transient_error_raises_unavailable_error(
    api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    api_server.inject(Fault())
    api_server.inject(Fault(api_statuses.service_unavailable()), times=9)
    with pytest.raises(UnavailableError) as caught:
        list(make_cluster(attempts=3).watch("Pod", seconds=5))
    assert str(caught.value) == (
        f"{api_server.url} could not watch pods in team-a (503: the server is currently unable to handle the request). "
        "Try again later."
    )
    assert len(api_server.requests) == 4


def test_missing_role_raises_setting_error(api_server: ApiServer, cluster: Cluster):
    api_server.inject(Fault(), Fault(api_statuses.rbac_denied("watch", "pods", "team-a")))
    with pytest.raises(SettingError, match="alice is not allowed to watch pods in namespace team-a"):
        list(cluster.watch("Pod", seconds=5))


def test_credentials_revoked_during_a_watch_raise_setting_error(
    api_server: ApiServer, make_cluster: Callable[..., Cluster]
):
    api_server.put(pod("a"))
    events = make_cluster().watch("Pod", seconds=TIMEOUT_SECONDS)
    assert next_events(events) == ["ADDED a Pending"]
    api_server.settings.token = "another"
    with pytest.raises(SettingError, match=r"rejected the credentials of context tests \(401: Unauthorized\)"):
        next(events)


def test_closing_the_generator_ends_the_watch(api_server: ApiServer, cluster: Cluster):
    api_server.put(pod("a"))
    events = cluster.watch("Pod", seconds=30)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert len(api_server.requests) == 1
