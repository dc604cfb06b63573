"""The role of the controller, which the chart and k8s/controller share, grants what it uses and nothing more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_objects
import sample_searches
from access import Access, granted_access, required_access
from api_server import ApiServer, Request
from ruamel.yaml import YAML
from sample_searches import SearchWorld

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.object_cache import Key
from topwork.cluster.controller.searches.search_cache import SearchKey

CONTROLLER = Path(__file__).parents[2] / "k8s" / "controller"
# Of kopf and the watches of other kinds, and of an admission plugin that checks the finalizers of owners. Whoever may
# read a TransferJob can read its status, too.
NOT_RECONCILED = {
    *(Access("watch", "topwork.dev", kind) for kind in ("transferjobs", "transfersearches")),
    Access("list", "topwork.dev", "transfersearches"),
    *(Access(verb, "batch", "jobs") for verb in ("list", "watch")),
    *(Access(verb, "", "pods") for verb in ("get", "list", "watch")),
    *(Access("update", "topwork.dev", f"{kind}/finalizers") for kind in ("transferjobs", "transfersearches")),
    *(Access("get", "topwork.dev", f"{kind}/status") for kind in ("transferjobs", "transfersearches")),
}


class RecordedCluster(SearchWorld):
    """A controlled cluster that records the requests of the controller, but not those of users."""

    def reconcile_key(self, key: Key | SearchKey) -> None:
        before = len(self.server.requests)
        super().reconcile_key(key)
        self.controller_requests += self.server.requests[before:]

    def restart(self) -> None:
        self.controller_requests: list[Request] = []
        super().restart()


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> Iterator[RecordedCluster]:
    return RecordedCluster(api_server, cluster, stage_seconds=60.0, shutdown_seconds=10.0)


def controller_rules() -> set[Access]:
    (role,) = YAML(typ="safe").load_all(CONTROLLER / "role.yaml")
    return granted_access(role["rules"])


def test_controller_uses_exactly_the_permissions_of_its_role(world: RecordedCluster) -> None:
    # Prefetch, several nodes, suspension, another run, cancellation, completion and deletion.
    world.apply(sample_objects.spec(prefetch=True, nodes=2))
    world.advance(40, step=20)
    world.suspend()
    world.advance(40, step=20)
    assert world.status()["state"] == "Suspended"
    world.suspend(False)
    world.advance(20)
    world.change(lambda job: job["spec"].update(seed=7))
    world.advance(60, step=20)
    world.annotate(cancel=world.status()["run"])
    world.advance(40, step=20)
    assert world.status()["state"] == "Cancelled"
    world.change(lambda job: job["spec"].update(seed=8))
    world.advance(400, step=50)
    assert world.status()["state"] == "Complete"
    world.delete()
    world.advance(20)
    # A search with a promoted trial, and with a trial that it no longer needs.
    world.apply(sample_searches.search(trials=1, pruner="asha"))
    world.finish()
    assert world.search_status()["state"] == "Complete"
    world.change_search(seed=7)
    world.settle()
    assert world.errors == []
    assert required_access(world.controller_requests) | NOT_RECONCILED == controller_rules()
