"""Random actions of users, restarts of the controller and stale caches: the outcome is what the spec asks for.

With TOPWORK_LONG=1, there are three times as many stories.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import sample_objects
from api_server import ApiServer
from controlled_cluster import ControlledCluster
from mortal_cluster import MortalCluster

from topwork.clients.kubernetes.cluster import ClusterSettings, connect
from topwork.cluster.manifests.transfer_job import parse_transfer_job

Object = dict[str, Any]
ACTIONS, SETTLED_ACTIONS = 12, 6
STORIES = 3 if os.environ.get("TOPWORK_LONG") else 1
FINAL = {"Complete", "Failed", "Cancelled"}
NETWORK_KINDS = ("Service", "NetworkPolicy")


class Story:
    """Random actions on one TransferJob.

    Args:
        world: The cluster.
        seed: Seed of the actions and of their timing.
    """

    def __init__(self, world: ControlledCluster, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)

    def act(self) -> None:
        """Do something that a user or a node does."""
        action = self.random.choice(self.choices())
        if self.world.server.get("TransferJob", "flowers"):
            action()
        else:
            self.world.apply(sample_objects.spec())

    def choices(self) -> list[Callable[[], Any]]:
        world = self.world
        return [
            lambda: self.set_epochs(20),
            lambda: self.set_epochs(10),
            lambda: world.set_compute(memory="32Gi"),
            lambda: world.set_compute(memory="64Gi"),
            lambda: world.set_compute(retries=5),
            lambda: world.change(lambda job: job["spec"]["publish"].pop("fold", None)),
            lambda: world.change(lambda job: job["spec"]["publish"].update(fold="all")),  # invalid
            world.suspend,
            lambda: world.suspend(False),
            lambda: world.suspend(False),
            lambda: world.annotate(cancel=world.status().get("run") or "none"),
            lambda: world.change(lambda job: job["metadata"].pop("annotations", None)),
            self.delete_job,
            self.evict,
            world.delete,
        ]

    def set_epochs(self, epochs: int) -> None:
        self.world.change(lambda job: job["spec"]["fineTune"].update(epochs=epochs))

    def delete_job(self) -> None:
        for job in self.world.jobs()[:1]:
            self.world.cluster.delete("Job", job, propagation="Foreground")

    def evict(self) -> None:
        for pod in self.world.active_pods()[:1]:
            self.world.kubernetes.evict(pod)

    def lag(self) -> None:
        """Let some time pass, in which the cache may fall behind, and the controller may be restarted."""
        for _ in range(self.random.randrange(1, 4)):
            self.world.kubernetes.clock.offset += self.random.choice([0, 5, 40])
            for _ in range(self.random.randrange(0, 3)):
                self.world.kubernetes.step()
            self.world.deliver(self.random.choice([0, 1, 3, None]))
            if self.random.random() < 0.8:
                self.world.reconcile()
        if self.random.random() < 0.3:
            self.world.restart()

    def end(self) -> Object:
        """Wait until nothing changes, and return the final status without times, and the objects."""
        if not self.world.server.get("TransferJob", "flowers"):
            self.world.apply(sample_objects.spec())
        self.world.advance(400, step=50)
        status = self.world.status()
        conditions = {item["type"]: (item["status"], item["reason"]) for item in status["conditions"]}
        kept = ("state", "run", "observedGeneration", "waitingFor", "gpus", "image", "attempts", "failures", "exitCode")
        config_maps = [item["metadata"]["name"] for item in self.world.server.list("ConfigMap")]
        network = [item["metadata"]["name"] for kind in NETWORK_KINDS for item in self.world.server.list(kind)]
        objects = {"jobs": self.world.jobs(), "config_maps": config_maps, "network": network}
        return {key: status.get(key) for key in kept} | objects | {"conditions": conditions}


class NodeStory(Story):
    """Random actions that also change the number of nodes, kill single pods, and delete what connects the nodes."""

    def choices(self) -> list[Callable[[], Any]]:
        world = self.world
        nodes = [lambda count=count: world.set_compute(nodes=count) for count in (1, 2, 2, 4)]
        return [*super().choices(), *nodes, self.kill, self.delete_network]

    def kill(self) -> None:
        pods = [pod for pod in self.world.kubernetes.pods if pod.ended is None and pod.container >= 0]
        if pods:
            self.world.kubernetes.kill(self.random.choice(pods).name)

    def delete_network(self) -> None:
        for obj in self.world.server.list(self.random.choice(NETWORK_KINDS)):
            self.world.server.remove(obj["kind"], obj["metadata"]["name"])


@pytest.fixture
def new_world(tmp_path: Path) -> Iterator[Callable[..., ControlledCluster]]:
    """Function that starts a cluster with a reconciler."""
    with ExitStack() as stack:

        def start(kind: Callable[..., ControlledCluster] = ControlledCluster, *arguments: Any) -> ControlledCluster:
            server = stack.enter_context(ApiServer())
            path = server.kubeconfig(tmp_path / server.url.rpartition(":")[2])
            cluster = connect(ClusterSettings(kubeconfig=str(path), timeout_seconds=5.0, backoff_seconds=0.01))
            return kind(server, cluster, *arguments)

        yield start


@pytest.mark.parametrize(
    ("seed", "kind"),
    [*((seed, Story) for seed in range(3 * STORIES)), *((seed, NodeStory) for seed in range(2 * STORIES))],
)
def test_random_actions_end_as_the_spec_asks(
    new_world: Callable[..., ControlledCluster], seed: int, kind: type[Story]
) -> None:
    world = new_world()
    story = kind(world, seed)
    world.apply(sample_objects.spec(**({"nodes": 2, "retries": 20} if kind is NodeStory else {})))
    for _ in range(ACTIONS):
        story.lag()
        story.act()
    check_outcome(story.end(), world)
    check_invariants(world)


@pytest.mark.parametrize(
    ("seed", "kind"), [*((seed, Story) for seed in range(2 * STORIES)), *((seed, NodeStory) for seed in range(STORIES))]
)
def test_a_controller_that_is_killed_leaves_the_same_objects_and_status(
    new_world: Callable[..., ControlledCluster], seed: int, kind: type[Story]
) -> None:
    ends = []
    mortal = new_world(MortalCluster, seed)
    for world in (new_world(), mortal):
        story = kind(world, seed)
        world.apply(sample_objects.spec(**({"nodes": 2, "retries": 20} if kind is NodeStory else {})))
        for _ in range(SETTLED_ACTIONS):
            world.advance(40)
            story.act()
        ends.append((story.end(), sorted(reason for reason, _ in world.events())))
        check_invariants(world)
    assert isinstance(mortal, MortalCluster)
    assert mortal.killing.kills > 0
    assert ends[1] == ends[0]


def check_invariants(world: ControlledCluster) -> None:
    pods = [pod for pod in world.kubernetes.pods if pod.role == "training"]
    assert [
        (one.name, other.name)
        for one, other in combinations(pods, 2)
        if (one.ended is None or one.ended > other.created)
        and not (one.job_uid == other.job_uid and one.index != other.index)
    ] == []
    transfer_job: Object = {}
    jobs: dict[str, Object] = {}
    for change in world.server.objects.history:
        obj = change.object
        if change.kind == "TransferJob":
            transfer_job = {} if change.type == "DELETED" else obj
        elif change.kind == "Job":
            jobs[obj["metadata"]["uid"]] = {} if change.type == "DELETED" else obj
            running = [job for job in jobs.values() if job and "deletionTimestamp" not in job["metadata"]]
            assert len(running) <= 1
            status = transfer_job.get("status") or {}
            if change.type == "ADDED" and status.get("observedGeneration") == transfer_job["metadata"]["generation"]:
                assert status["state"] not in FINAL


def check_outcome(status: Object, world: ControlledCluster) -> None:
    stored = deepcopy(world.server.get("TransferJob", "flowers"))
    assert stored is not None
    canceled = stored["metadata"].get("annotations", {}).get("topwork.dev/cancel")
    is_valid = "fold" not in stored["spec"]["publish"]
    assert status["observedGeneration"] == stored["metadata"]["generation"]
    assert status["conditions"]["Accepted"][0] == ("True" if is_valid else "False")
    if not is_valid:
        assert status["state"] in {"Complete", "Failed", "Suspended", "Cancelled"}
        return
    assert status["run"] == parse_transfer_job(stored).run
    if canceled == status["run"]:
        assert status["state"] in {"Cancelled", "Complete"}
    elif stored["spec"].get("suspend"):
        assert status["state"] in {"Suspended", "Complete", "Cancelled"}
    else:
        assert status["state"] in {"Complete", "Cancelled"}
        assert status["state"] == "Complete" or "Cancelled" in str(world.events())
