"""The role of the controller, which the chart and k8s/controller share, grants what it uses and nothing more."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sample_objects
from access import Access, granted_access, required_access
from api_server import ApiServer, Request
from controlled_cluster import ControlledCluster
from ruamel.yaml import YAML

from topwork.clients.kubernetes.cluster import Cluster

CONTROLLER = Path(__file__).parents[2] / "k8s" / "controller"
# Of kopf and the watches of Jobs and pods, and of an admission plugin that checks the finalizers of owners. Whoever may
# read a TransferJob can read its status, too.
NOT_RECONCILED = {
    *(Access(verb, "topwork.dev", "transferjobs") for verb in ("list", "watch")),
    *(Access(verb, "batch", "jobs") for verb in ("list", "watch")),
    *(Access(verb, "", "pods") for verb in ("get", "list", "watch")),
    Access("update", "topwork.dev", "transferjobs/finalizers"),
    Access("get", "topwork.dev", "transferjobs/status"),
}


class RecordedCluster(ControlledCluster):
    """A controlled cluster that records the requests of the controller, but not those of users."""

    def reconcile(self, name: str = "flowers") -> None:
        before = len(self.server.requests)
        super().reconcile(name)
        self.controller_requests += self.server.requests[before:]

    def restart(self) -> None:
        self.controller_requests: list[Request] = []
        super().restart()


@pytest.fixture
def world(api_server: ApiServer, cluster: Cluster) -> Iterator[RecordedCluster]:
    return RecordedCluster(api_server, cluster)


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
    assert world.errors == []
    assert required_access(world.controller_requests) | NOT_RECONCILED == controller_rules()
