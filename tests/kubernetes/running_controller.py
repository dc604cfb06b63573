"""The reconciler and the simulated Kubernetes in a thread, for tests of commands and of the Python client."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from api_server import ApiServer
from controlled_cluster import ControlledCluster

from topwork.clients.kubernetes.cluster import Cluster

World = TypeVar("World", bound=ControlledCluster)


@contextmanager
def running_controller(
    server: ApiServer, cluster: Cluster, kind: type[World] = ControlledCluster, **simulation: Any
) -> Iterator[World]:
    """Run the controller over an API server; simulated time passes a hundred times as fast as real time."""
    world, stop = kind(server, cluster, **simulation), threading.Event()

    def run() -> None:
        while not stop.is_set():
            world.advance(10)
            time.sleep(0.1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield world
    finally:
        stop.set()
        thread.join(30)
    assert world.errors == []
