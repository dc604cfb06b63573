"""Combines the states that the nodes of a run report into the state of the run."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from topwork.cluster.status.snapshot import GpuUsage, NodeSnapshot, RunSnapshot, StorageTraffic, TrainingSpeed

CHIEF_MISSING = "no metrics of node 0, which reports the progress of the run"


def combine_nodes(snapshots: Iterable[RunSnapshot]) -> list[RunSnapshot]:
    """Combine the snapshots of processes into one snapshot per run.

    Args:
        snapshots: The state of each process. A process of a run on several nodes has its node in `nodes`.

    Returns:
        The runs, in the order of their first process. Runs on one node are unchanged.
    """
    groups: dict[object, list[RunSnapshot]] = {}
    for position, snapshot in enumerate(snapshots):
        key = (snapshot.namespace, snapshot.run) if snapshot.nodes else position
        groups.setdefault(key, []).append(snapshot)
    return [_combine(group) if group[0].nodes else group[0] for group in groups.values()]


def _combine(group: Sequence[RunSnapshot]) -> RunSnapshot:
    # The newest process of each node: an earlier one may still be listed.
    newest: dict[int, RunSnapshot] = {}
    for process in sorted(group, key=lambda process: process.read_seconds_ago, reverse=True):
        newest[process.nodes[0].index] = process
    processes = [newest[index] for index in sorted(newest)]
    nodes = tuple(_with_state(process) for process in processes)
    first = processes[0]
    reason = first.reason if nodes[0].index == 0 else CHIEF_MISSING
    return replace(
        first,
        reason=reason,
        speed=_speed(first.speed, nodes),
        gpus=tuple(replace(gpu, index=f"{node.index}/{gpu.index}") for node in nodes for gpu in node.gpus),
        traffic=_traffic(processes),
        retries=sum(process.retries or 0 for process in processes),
        nodes=nodes,
    )


def _with_state(process: RunSnapshot) -> NodeSnapshot:
    """Return the node of a process with what was found out about the process after its metrics were read."""
    return replace(
        process.nodes[0], state=process.state, reason=process.reason, read_seconds_ago=process.read_seconds_ago
    )


def _speed(speed: TrainingSpeed | None, nodes: Sequence[NodeSnapshot]) -> TrainingSpeed | None:
    """Return the speed with the longest input wait of a node: the other nodes wait for it."""
    waits = [node.input_wait for node in nodes if node.input_wait is not None]
    return replace(speed, input_wait=max(waits)) if speed and waits else speed


def _traffic(processes: Sequence[RunSnapshot]) -> dict[str, StorageTraffic]:
    """Add the traffic of all nodes."""
    total: dict[str, StorageTraffic] = {}
    for process in processes:
        for direction, traffic in process.traffic.items():
            before = total.get(direction, StorageTraffic(0.0, None))
            rates = [rate for rate in (before.bytes_per_second, traffic.bytes_per_second) if rate is not None]
            total[direction] = StorageTraffic(before.bytes + traffic.bytes, sum(rates) if rates else None)
    return total


def mean_utilization(gpus: Sequence[GpuUsage]) -> float | None:
    """Return the mean utilization of those GPUs that report it; None if none does."""
    values = [gpu.utilization for gpu in gpus if gpu.utilization is not None]
    return sum(values) / len(values) if values else None
