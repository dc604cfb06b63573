"""All runs of a namespace or of a cluster at once: few requests, however many there are."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.names import ROLE_LABEL, RUN_LABEL
from topwork.cluster.operations.find_runs import OURS
from topwork.cluster.status.epochs import Epoch, last_epoch
from topwork.cluster.status.objects import RunObjects, label
from topwork.cluster.status.run_state import RunState, run_state
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

MOST_LOGS = 48
AT_ONCE = 12
LOGS_SECONDS = 6.0
"""Time for all logs together: a node that does not answer must not hold up a list."""
LAST_LINES = 200


def read_states(cluster: "Cluster", *, all_namespaces: bool = False) -> list[RunState]:
    """Read how all runs stand, without what their logs tell.

    Args:
        cluster: The cluster.
        all_namespaces: Of all namespaces.

    Returns:
        The states, the newest run first.
    """
    jobs = cluster.list("Job", labels=f"{OURS},{RUN_LABEL}", all_namespaces=all_namespaces)
    if not jobs:
        return []
    pods = cluster.list("Pod", labels=f"{OURS},{RUN_LABEL}", all_namespaces=all_namespaces)
    events: list[KubernetesObject] = []
    # Whoever must not read events still gets the list.
    with suppress(SettingError):
        events = cluster.list("Event", fields="reason=FailedCreate", all_namespaces=all_namespaces)
    return [run_state(objects) for objects in grouped(jobs, pods, events)]


def grouped(
    jobs: Iterable[KubernetesObject], pods: Iterable[KubernetesObject], events: Sequence[KubernetesObject] = ()
) -> list[RunObjects]:
    """Sort the Jobs and pods of many runs into runs.

    Args:
        jobs: Jobs, of several namespaces too.
        pods: Their pods.
        events: Events about them.

    Returns:
        The objects of each run, the newest run first.
    """
    found: dict[tuple[str, str], tuple[list[KubernetesObject], list[KubernetesObject]]] = {}
    for job in sorted(jobs, key=lambda job: str(job["metadata"].get("creationTimestamp")), reverse=True):
        if label(job, ROLE_LABEL):
            found.setdefault(_key(job), ([], []))[0].append(job)
    for pod in pods:
        if _key(pod) in found:
            found[_key(pod)][1].append(pod)
    return [RunObjects(its_jobs, its_pods, events) for its_jobs, its_pods in found.values()]


def with_epochs(states: Sequence[RunState], cluster_of: Callable[[str], "Cluster"]) -> list[RunState]:
    """Add what the logs of the running containers tell.

    Args:
        states: States; the logs of the first 48 that run are read.
        cluster_of: Gives a connection to a namespace.

    Returns:
        The states, with epochs as far as their logs answer in time.
    """
    running = [index for index, state in enumerate(states) if state.running][:MOST_LOGS]
    clusters = {namespace: cluster_of(namespace) for namespace in {states[index].namespace for index in running}}
    epochs: dict[int, Epoch | None] = {}
    left = list(reversed(running))

    def work() -> None:
        with suppress(IndexError):
            while True:
                index = left.pop()
                epochs[index] = _read_epoch(clusters[states[index].namespace], states[index])

    # Threads that end with the process: a node may never answer.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(running)))]
    until = time.monotonic() + LOGS_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return [with_epoch(state, epochs.get(index)) for index, state in enumerate(states)]


def with_epoch(state: RunState, epoch: Epoch | None) -> RunState:
    """Add how far the running stage is."""
    if epoch is None or epoch.stage != state.stage:
        return state
    metric = (epoch.metric, epoch.best) if epoch.metric else (state.metric, state.value)
    return replace(state, epoch=epoch, metric=metric[0], value=metric[1])


def _read_epoch(cluster: "Cluster", state: RunState) -> Epoch | None:
    if state.running is None:
        return None
    try:
        return last_epoch(cluster.logs(*state.running, tail=LAST_LINES))
    except (SettingError, UnavailableError):
        return None


def _key(thing: KubernetesObject) -> tuple[str, str]:
    return str(thing["metadata"].get("namespace")), str(label(thing, RUN_LABEL))
