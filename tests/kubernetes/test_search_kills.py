"""The controller is killed, or overtaken by another one, during a search: same trials, same winner, no trial twice."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sample_searches
from api_server import NAMESPACE, ApiServer
from mortal_cluster import MortalCluster
from sample_searches import SearchWorld

from topwork.clients.kubernetes.cluster import Cluster, ClusterSettings, connect
from topwork.cluster.controller.searches.config_map_journal import decode_events
from topwork.cluster.controller.searches.search_cache import SEARCH, SearchKey
from topwork.cluster.controller.searches.search_reconciler import AGAIN_SECONDS, SearchReconciler

Object = dict[str, Any]
UNEQUAL = ("time", "seconds", "gpu_seconds")
"""Values of events that depend on the clock."""
SEARCHES: dict[str, Object] = {
    "asha": {"trials": 3, "pruner": "asha", "sampler": "tpe"},
    # The order in which parallel trials end differs, and with it what a sampler has learned before it chooses the next.
    "parallel": {"trials": 5, "parallel": 2, "sampler": "random"},
}


class MortalSearchWorld(SearchWorld, MortalCluster):
    """A search whose controller is killed before or after some of its requests."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Object]:
    """The outcome of each search without kills."""
    outcomes = {}
    for name, spec in SEARCHES.items():
        with ApiServer() as server:
            world = SearchWorld(server, _connect(server, tmp_path_factory.mktemp(name)))
            outcomes[name] = finish(world, spec)
    return outcomes


def _connect(server: ApiServer, directory: Path) -> Cluster:
    path = server.kubeconfig(directory / "kubeconfig")
    return connect(ClusterSettings(kubeconfig=str(path), timeout_seconds=5.0, backoff_seconds=0.01))


def finish(world: SearchWorld, spec: Object) -> Object:
    """Run a search to its end; return its journal, its TransferJobs, and the Jobs of each run."""
    world.apply(sample_searches.search(**spec))
    world.kubernetes.kubelet.stage_seconds = 10.0
    for _ in range(40):
        world.advance(20)
        if world.search_status().get("state") in {"Complete", "Failed"}:
            break
    status = world.search_status()
    (journal,) = [item for item in world.server.list("ConfigMap") if "binaryData" in item]
    events = [{key: value for key, value in event.items() if key not in UNEQUAL} for event in decode_events(journal)]
    jobs = {(pod.run, pod.job_uid) for pod in world.kubernetes.pods}
    return {
        "state": status["state"],
        "best": status["best"],
        "model": status["model"],
        "trials": status["trials"],
        "events": Counter(str(sorted(event.items(), key=lambda item: item[0])) for event in events),
        "specs": {name: obj["spec"] for name, obj in world.trial_jobs().items()},
        "jobs": Counter(run for run, _ in jobs),
    }


@pytest.mark.parametrize(("name", "seed"), [("asha", 0), ("asha", 1), ("parallel", 2)])
def test_kills_of_the_controller_do_not_change_a_search(
    api_server: ApiServer, cluster: Cluster, expected: dict[str, Object], name: str, seed: int
) -> None:
    world = MortalSearchWorld(api_server, cluster, seed)
    outcome = finish(world, SEARCHES[name])
    print(f"\n{name}: {world.killing.kills} kills, {sum(outcome['events'].values())} events")
    assert world.killing.kills > 5
    assert outcome == expected[name]
    assert set(outcome["jobs"].values()) == {1}
    assert world.errors == []


class OvertakenCluster(Cluster):
    """A connection that lets something happen before it first replaces the journal."""

    def __init__(self, cluster: Cluster, overtake: Callable[[], object]) -> None:
        super().__init__(cluster._client, cluster.namespace)
        self._overtake: Callable[[], object] | None = overtake

    def in_namespace(self, namespace: str) -> Cluster:
        return self

    def replace(self, obj: Object) -> Object:
        if obj["kind"] == "ConfigMap" and self._overtake:
            overtake, self._overtake = self._overtake, None
            overtake()
        return super().replace(obj)


def test_a_controller_that_is_overtaken_starts_no_trial(api_server: ApiServer, cluster: Cluster) -> None:
    world = SearchWorld(api_server, cluster)
    world.apply(sample_searches.search(trials=3, parallel=3))
    world.deliver()
    written: list[Object] = []

    def overtake() -> None:
        world.reconcile_search()
        written.extend(api_server.list("ConfigMap"))

    overtaken = OvertakenCluster(cluster, overtake)
    cache = world.dispatcher.search_cache
    assert SearchReconciler(overtaken, cache, world.now).reconcile(SearchKey(NAMESPACE, SEARCH, "flowers")) == (
        AGAIN_SECONDS
    )
    assert api_server.list("ConfigMap") == written
    events = [(event["event"], event.get("number")) for event in decode_events(written[0])]
    assert events == [("created", None), ("started", 0), ("started", 1), ("started", 2)]
    assert [*world.trial_jobs()] == ["flowers-0", "flowers-1", "flowers-2"]
