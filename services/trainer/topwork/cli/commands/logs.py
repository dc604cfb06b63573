"""`topwork logs`: print the logs of the containers of a run."""

import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import As, Context, Kubeconfig, Namespace, open_cluster
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.operations.logs import LogEntry, RunLog
    from topwork.cluster.operations.run_lookup import RunMatch

ALL_NODES = "all"


class Stage(StrEnum):
    """The stages that run in a container."""

    pull = "pull"
    transfer = "transfer"
    fine_tune = "fine-tune"


def logs(
    name: Annotated[str, typer.Argument(help="Name of a job, for its newest run, or of a run.")],
    stage: Annotated[Stage | None, typer.Option(help="Only the log of this stage.")] = None,
    node: Annotated[
        str,
        typer.Option(
            metavar="INDEX",
            help="Index of the node of a run on several nodes, or all. With all, each line starts with its node.",
        ),
    ] = "0",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log across containers until the run is finished.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
) -> None:
    """Print the log of a run, attempt by attempt; of a run on several nodes, that of node 0.

    Standard output contains the lines of the containers: one JSON object per line. Standard error contains a heading
    for each container. Exit codes: 0 success; 2 no such run, it ended without a log, or the cluster rejected a request;
    75 it has not started yet, or the API server or a node does not respond; 130 after Ctrl-C, which does not stop the
    run.
    """
    cluster = open_cluster(namespace, context, kubeconfig)
    from topwork.cli.output.follow import INTERRUPTED, ConnectionOptions
    from topwork.cluster.operations.run_lookup import find_run

    logs_of_nodes = _open_logs(cluster, find_run(cluster, name, as_kind), stage, node)
    if not follow:
        raise typer.Exit(_print(_read(logs_of_nodes)))
    options = [*(["--stage", stage.value] if stage else []), *(["--node", node] if node != "0" else []), "-f"]
    command = ConnectionOptions(cluster.namespace, context, kubeconfig).command(f"logs {name}", *options)
    reattach = f"The job continues. Follow it again with: {command}"
    try:
        code = _print(_follow(logs_of_nodes))
    except KeyboardInterrupt:
        print(f"\n{reattach}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (SettingError, UnavailableError) as error:
        raise type(error)(f"{error}\n{reattach}") from error
    raise typer.Exit(code)


def _open_logs(cluster: "Cluster", match: "RunMatch", stage: Stage | None, node: str) -> "list[RunLog]":
    """Open the log of a node, or of all nodes."""
    from topwork.cluster.operations.logs import RunLog
    from topwork.cluster.operations.run_lookup import read_node_count
    from topwork.cluster.status.objects import name_of

    nodes = [0]
    if node != "0":
        count = read_node_count(cluster, match)
        nodes = list(range(count)) if node == ALL_NODES else [index for index in range(count) if str(index) == node]
        if not nodes:
            run = match.run or "the run"
            expected = f"an index from 0 to {count - 1}, or all: {run} has {count} nodes"
            raise SettingError(f"--node is {node}, expected {expected if count > 1 else f'0: {run} has one node'}.")
    transfer_job = name_of(match.transfer_job) if match.transfer_job else None
    return [RunLog(cluster, match.run, stage.value if stage else None, transfer_job, index) for index in nodes]


def _read(logs_of_nodes: "list[RunLog]") -> "Iterator[tuple[str, LogEntry]]":
    """Yield the entries of logs, each with the prefix of its line: none for a single node."""
    from topwork.cluster.operations.node_logs import NodeLogs

    if len(logs_of_nodes) == 1:
        yield from (("", entry) for entry in logs_of_nodes[0].read())
    else:
        yield from ((_prefix(entry.node), entry.entry) for entry in NodeLogs(logs_of_nodes).read())


def _follow(logs_of_nodes: "list[RunLog]") -> "Iterator[tuple[str, LogEntry]]":
    from topwork.cluster.operations.node_logs import NodeLogs

    if len(logs_of_nodes) == 1:
        yield from (("", entry) for entry in logs_of_nodes[0].follow())
    else:
        yield from ((_prefix(entry.node), entry.entry) for entry in NodeLogs(logs_of_nodes).follow())


def _prefix(node: int) -> str:
    return f"[node {node}] "


def _print(entries: "Iterator[tuple[str, LogEntry]]") -> int:
    """Print a log and return the exit code: that of the first part that is missing, or 0."""
    from topwork.cluster.operations.logs import ContainerHeading, Note

    code = 0
    for prefix, entry in entries:
        if isinstance(entry, ContainerHeading):
            print(f"── {entry.pod} {entry.stage} ──", file=sys.stderr, flush=True)
        elif isinstance(entry, Note):
            print(f"{prefix}{entry.text}", file=sys.stderr, flush=True)
            code = code or entry.exit_code
        else:
            print(f"{prefix}{entry}", flush=True)
    return code
