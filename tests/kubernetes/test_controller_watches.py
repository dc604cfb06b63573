"""Watches of the controller: the cache converges to the state of the cluster, whatever the API server does."""

import threading
import time
from collections.abc import Callable, Iterator

import api_statuses
import pytest
from api_server import ApiServer
from api_statuses import Fault
from sample_crd import definition

from topwork.cluster.controller.object_cache import ObjectCache
from topwork.cluster.controller.runtime import operator, watches
from topwork.cluster.controller.runtime.operator import TransferJobWatch
from topwork.cluster.controller.runtime.watches import ObjectWatch

LABELS = {"app.kubernetes.io/part-of": "topwork", "topwork.dev/job": "cats"}
PATHS = {"TransferJob": "/transferjobs", "Job": "/jobs", "Pod": "/pods"}
KINDS = tuple(PATHS)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(operator, "RETRY_DELAYS", (0.05, 0.05))
    monkeypatch.setattr(operator, "RECONNECT_SECONDS", 0.05)
    monkeypatch.setattr(operator, "COMPARE_AFTER_LIST_SECONDS", 0.1)
    monkeypatch.setattr(operator, "STREAM_SECONDS", 2)
    monkeypatch.setattr(operator, "SILENCE_SECONDS", 3.0)
    monkeypatch.setattr(watches, "ROUND_SECONDS", 1.0)
    for module in (operator, watches):
        monkeypatch.setattr(module, "backoff_seconds", lambda _failures: 0.1)


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    with ApiServer(crds=[definition()]) as server:
        yield server


class Watched:
    """All watches of a namespace, and the cache that they fill."""

    def __init__(self, cluster, namespace: str | None = "team-a") -> None:
        self.cache = ObjectCache()
        self.events: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.dependents: dict[str, dict[str, str]] = {"Job": {}, "Pod": {}}
        self.transfer_jobs = TransferJobWatch(cluster, namespace, self.handle, self.cache.transfer_jobs)
        self.objects = [ObjectWatch(cluster, kind, namespace, self.handle) for kind in ("Job", "Pod")]
        self.all = [self.transfer_jobs, *self.objects]

    def start(self) -> "Watched":
        for watch in self.all:
            watch.start()
        return self

    def stop(self) -> None:
        for watch in self.all:
            watch.stop()
        for watch in self.all:
            watch._thread.join(15)

    def handle(self, event_type, obj):
        with self.lock:
            self.events.append((event_type, obj["metadata"]["name"]))
            self.cache.update(event_type, obj)
            if obj["kind"] in self.dependents:
                versions = self.dependents[obj["kind"]]
                versions.pop(obj["metadata"]["uid"], None)
                if event_type != "DELETED":
                    versions[obj["metadata"]["uid"]] = obj["metadata"]["resourceVersion"]

    def state(self) -> dict[str, dict[str, str]]:
        """resourceVersion of each known object, by kind and UID."""
        with self.lock:
            known = {obj["metadata"]["uid"]: obj["metadata"]["resourceVersion"] for obj in self.cache.transfer_jobs()}
            return {"TransferJob": known} | {kind: dict(found) for kind, found in self.dependents.items()}


@pytest.fixture
def make_watched(api_server, make_cluster) -> Iterator[Callable[..., Watched]]:
    made = []

    def make(namespace: str | None = "team-a") -> Watched:
        made.append(Watched(make_cluster(attempts=2, stream_seconds=1.0, timeout_seconds=1.0), namespace))
        return made[-1]

    yield make
    for watched in made:
        watched.stop()


@pytest.fixture
def watched(api_server, make_watched) -> Watched:
    for kind in KINDS:
        for number in range(3):
            put(api_server, kind, f"cats-{number}")
    return make_watched().start()


def put(server, kind, name, **metadata):
    versions = {"TransferJob": "topwork.dev/v1alpha1", "Job": "batch/v1", "Pod": "v1"}
    return server.put({
        "apiVersion": versions[kind], "kind": kind,
        "metadata": {"name": name, "labels": LABELS, "namespace": "team-a"} | metadata, "spec": {},
    })  # fmt: skip


def actual_state(server):
    return {
        kind: {obj["metadata"]["uid"]: obj["metadata"]["resourceVersion"] for obj in server.list(kind)}
        for kind in KINDS
    }


def change_everything(server):
    """Create, change, delete and replace an object of each kind."""
    for kind in KINDS:
        put(server, kind, "new")
        server.patch(kind, "cats-0", {"metadata": {"annotations": {"changed": str(time.monotonic())}}})
        server.remove(kind, "cats-1")
        server.remove(kind, "cats-2")
        put(server, kind, "cats-2")


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_converges(watched, server, seconds=15.0):
    deadline = time.monotonic() + seconds
    while watched.state() != actual_state(server):
        assert time.monotonic() < deadline, (watched.state(), actual_state(server), [w.error for w in watched.all])
        time.sleep(0.02)


def wait_for_streams(server, since=0):
    """Wait until all kinds are being watched."""
    for path in PATHS.values():
        until(lambda path=path: any("watch" in r.query and path in r.path for r in server.requests[since:]))


def test_watches_report_existing_objects_and_changes(api_server, watched):
    until(lambda: all(watch.is_synced for watch in watched.all))
    assert_converges(watched, api_server)
    change_everything(api_server)
    assert_converges(watched, api_server)
    assert [watch.error for watch in watched.all] == ["", "", ""]
    assert [watch.problem() for watch in watched.all] == [None, None, None]


def test_kopf_only_reads(api_server, watched):
    wait_for_streams(api_server)
    change_everything(api_server)
    assert_converges(watched, api_server)
    assert {request.method for request in api_server.requests} == {"GET"}
    paths = {request.path for request in api_server.requests if request.query}
    assert all("/namespaces/team-a/" in path for path in paths)
    for obj in api_server.list("TransferJob"):
        assert not obj["metadata"].get("finalizers")
        assert not set(obj["metadata"].get("annotations", {})) - {"changed"}


WATCH_FAULTS = {
    "410": Fault(api_statuses.expired()),
    "429": Fault(api_statuses.too_many_requests(0), headers={"Retry-After": "0"}),
    "500": Fault(api_statuses.internal_error()),
    "503": Fault(api_statuses.service_unavailable()),
    "401": Fault(api_statuses.unauthorized()),
    "403": Fault(api_statuses.rbac_denied("watch", "transferjobs", "team-a")),
    "not JSON": Fault(body=b"<html>proxy</html>"),
    "cut at once": Fault(cut_after_bytes=0),
    "cut in the middle of a line": Fault(cut_after_bytes=150),
    "reset": Fault(reset=True),
    "silent": Fault(stall_after_bytes=0),
}


@pytest.mark.parametrize("name", WATCH_FAULTS)
def test_watches_recover_from_a_fault(api_server, watched, name):
    wait_for_streams(api_server)
    assert_converges(watched, api_server)
    for path in PATHS.values():
        fault = WATCH_FAULTS[name]
        api_server.inject(Fault(**(vars(fault) | {"path": path, "method": "GET"})), times=4)
    change_everything(api_server)
    api_server.compact()  # watches end with 410, lists meet the injected fault
    change_everything(api_server)
    assert_converges(watched, api_server, 30.0)
    until(lambda: not any(watch.error for watch in watched.all))


def test_objects_deleted_during_an_interruption_are_reported(api_server, watched):
    wait_for_streams(api_server)
    assert_converges(watched, api_server)
    for path in PATHS.values():
        api_server.inject(Fault(api_statuses.service_unavailable(), path=path), times=8)
    for path in PATHS.values():  # the current streams have ended
        until(
            lambda path=path: any(
                (r.code, r.query.get("watch")) == (503, "true") and path in r.path for r in list(api_server.requests)
            )
        )
    for kind in KINDS:
        api_server.remove(kind, "cats-1")
    api_server.compact()
    assert_converges(watched, api_server)


def test_watches_wait_until_the_kind_is_served(api_server, make_watched):
    api_server.remove("CustomResourceDefinition", "transferjobs.topwork.dev")
    watched = make_watched().start()
    until(lambda: "install the CustomResourceDefinition" in watched.transfer_jobs.error)
    assert not watched.transfer_jobs.is_synced
    assert watched.transfer_jobs.problem() is None
    api_server.install_crd(definition())
    put(api_server, "TransferJob", "late")
    assert_converges(watched, api_server)
    assert watched.transfer_jobs.error == ""


def test_a_missing_permission_is_reported_until_it_is_granted(api_server, make_watched):
    denied = api_statuses.rbac_denied("list", "transferjobs", "team-a", user="system:serviceaccount:team-a:topwork")
    api_server.inject(Fault(denied, path="/transferjobs"), times=3)
    watched = make_watched().start()
    until(lambda: "is not allowed to list transferjobs in namespace team-a" in watched.transfer_jobs.error)
    until(lambda: watched.transfer_jobs.is_synced and not watched.transfer_jobs.error)


def test_a_namespace_without_permission_does_not_block_the_others(api_server, make_cluster):
    api_server.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-b"}})
    rules = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    api_server.allow(rules, namespace="team-a")
    cluster, cache = make_cluster(attempts=2, stream_seconds=1.0, timeout_seconds=1.0), ObjectCache()
    scopes = ("team-a", "team-b")
    allowed, denied = (TransferJobWatch(cluster, scope, cache.update, cache.transfer_jobs) for scope in scopes)
    jobs = ObjectWatch(cluster, "Job", "team-b", cache.update)

    def names():
        return sorted(obj["metadata"]["name"] for obj in cache.transfer_jobs())

    for watch in (allowed, denied, jobs):
        watch.start()
    try:
        put(api_server, "TransferJob", "a1")
        until(lambda: allowed.is_synced and denied.is_synced and jobs.is_synced and names() == ["a1"])
        assert "not allowed to list transferjobs in namespace team-b" in denied.error
        put(api_server, "TransferJob", "b1", namespace="team-b")
        api_server.allow(rules, namespace="team-b")
        until(lambda: names() == ["a1", "b1"] and not denied.error and not jobs.error)
        api_server.user.grants = [grant for grant in api_server.user.grants if grant[0] == "team-a"]
        until(lambda: "team-b" in denied.error)
        put(api_server, "TransferJob", "a2")
        until(lambda: "a2" in names() and not allowed.error)
    finally:
        for watch in (allowed, denied, jobs):
            watch.stop()


def test_an_error_of_a_handler_does_not_end_a_watch(api_server, make_watched):
    watched = make_watched()
    failed = set()
    handle = watched.handle

    def fail_once(event_type, obj):
        if (kind := obj["kind"]) not in failed:
            failed.add(kind)
            raise RuntimeError("bug")
        handle(event_type, obj)

    watched.transfer_jobs._handle = fail_once
    for watch in watched.objects:
        watch._handle = fail_once
    for kind in KINDS:
        put(api_server, kind, "cats-0")
    watched.start()
    until(lambda: failed == set(KINDS))
    for kind in KINDS:
        api_server.patch(kind, "cats-0", {"metadata": {"annotations": {"changed": "yes"}}})
    assert_converges(watched, api_server)


def test_watches_of_all_namespaces(api_server, make_watched):
    watched = make_watched(None).start()
    for namespace in ("team-a", "default"):
        put(api_server, "TransferJob", "cats", namespace=namespace)
    until(lambda: len(watched.cache.transfer_jobs()) == 2)
    assert not any("/namespaces/" in request.path for request in api_server.requests)
