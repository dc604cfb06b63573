"""A controlled cluster whose controller is killed before or after some of its requests, and started again."""

import random
from typing import Any

from api_server import ApiServer
from controlled_cluster import ControlledCluster

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.object_cache import Key
from topwork.cluster.controller.searches.search_cache import SearchKey

KILL_PROBABILITY = 0.15
Object = dict[str, Any]


class KilledError(Exception):
    """The controller was killed."""


class KillingCluster(Cluster):
    """A connection that kills its process before or after some of the writing requests."""

    def __init__(self, cluster: Cluster, random: random.Random) -> None:
        super().__init__(cluster._client, cluster.namespace)
        self.random, self.kills = random, 0

    def in_namespace(self, namespace: str) -> Cluster:
        return self

    def _may_kill(self) -> None:
        if self.random.random() < KILL_PROBABILITY:
            self.kills += 1
            raise KilledError

    def apply(self, obj: Object, **options: Any) -> Object:
        self._may_kill()
        stored = super().apply(obj, **options)
        self._may_kill()
        return stored

    def create(self, obj: Object) -> Object:
        self._may_kill()
        stored = super().create(obj)
        self._may_kill()
        return stored

    def replace(self, obj: Object) -> Object:
        self._may_kill()
        stored = super().replace(obj)
        self._may_kill()
        return stored

    def delete(self, *arguments: Any, **options: Any) -> bool:
        self._may_kill()
        deleted = super().delete(*arguments, **options)
        self._may_kill()
        return deleted


class MortalCluster(ControlledCluster):
    """A cluster whose controller is killed now and then, and started again."""

    def __init__(self, server: ApiServer, cluster: Cluster, seed: int, **simulation: Any) -> None:
        self.killing = KillingCluster(cluster, random.Random(seed))
        super().__init__(server, cluster, **simulation)

    def controller_cluster(self) -> Cluster:
        return self.killing

    def reconcile_key(self, key: Key | SearchKey) -> None:
        try:
            super().reconcile_key(key)
        except KilledError:
            self.restart()
