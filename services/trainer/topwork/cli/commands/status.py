"""`topwork status` and `topwork list`: how runs in the cluster stand."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, Namespace, open_cluster
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.cli.output.follow import Where
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.status.run_state import RunState

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def status(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A job, for its newest run, or a run; none: the list.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_json: Json = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the run until it is over; ends with its exit code.")
    ] = False,
) -> None:
    """Show how a run stands: stages, epochs, best metric, attempts, why it waits or failed, and where its model is.

    The exit code is 0 whatever the run's, but with --follow, which ends with the run's. With --json: job, run,
    namespace, phase (pending, pulling ahead, running, stopping, succeeded, failed or suspended), stage, epoch, epochs,
    metric, value, model, exitCode, reason, error, created, ended, node, queue, failures, retries, and attempts (pod,
    node, created, state, exitCode, error, counted, stages (stage, state, started, ended, exitCode, epochs, metric,
    value, error)). What is not known is null; keys are only ever added.
    """
    if follow and (name is None or as_json):
        raise SettingError("--follow needs the name of a job or a run, and does not go with --json.")
    cluster = open_cluster(namespace, context, kubeconfig)
    if name is None:
        _list(cluster, lambda _: cluster, as_json=as_json)
        return
    from topwork.cli.output import follow as following
    from topwork.cli.output import run_status
    from topwork.cluster.operations.find_runs import find_run

    found = find_run(cluster, name)
    where = following.Where(cluster.namespace, context, kubeconfig)
    if follow:
        code = following.follow(cluster, found.run, where)
        raise typer.Exit(code)
    state = _state(cluster, found.run)
    if as_json:
        print(json.dumps(run_status.as_json(state), indent=2))
        return
    for line in run_status.detail(state, found.others):
        print(line)
    print()
    for line in _next(state, where):
        print(line)


def list_runs(
    namespace: Namespace = None,
    all_namespaces: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of all namespaces.")] = False,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_json: Json = False,
) -> None:
    """List the runs in the cluster, the newest first; --json prints a list of what topwork status --json prints."""
    cluster = open_cluster(namespace, context, kubeconfig)

    def cluster_of(other: str) -> "Cluster":
        return cluster if other == cluster.namespace else open_cluster(other, context, kubeconfig)

    _list(cluster, cluster_of, as_json=as_json, all_namespaces=all_namespaces)


def _list(
    cluster: "Cluster", cluster_of: Callable[[str], "Cluster"], *, as_json: bool, all_namespaces: bool = False
) -> None:
    from topwork.cli.output import run_status
    from topwork.cluster.operations.list_runs import read_states, with_epochs

    states = with_epochs(read_states(cluster, all_namespaces=all_namespaces), cluster_of)
    if as_json:
        print(json.dumps([run_status.as_json(state) for state in states], indent=2))
    elif states:
        for line in run_status.table(states, namespaces=all_namespaces):
            print(line)
    else:
        where = "any namespace" if all_namespaces else f"namespace {cluster.namespace}"
        print(f"No runs found in {where}.", file=sys.stderr)


def _state(cluster: "Cluster", run: str) -> "RunState":
    from topwork.cluster.operations.find_runs import read_run
    from topwork.cluster.operations.list_runs import with_epochs
    from topwork.cluster.status.run_state import run_state

    objects = read_run(cluster, run)
    if not objects.jobs:
        raise SettingError(f"{run} has just been deleted from namespace {cluster.namespace}.")
    return with_epochs([run_state(objects)], lambda _: cluster)[0]


def _next(state: "RunState", where: "Where") -> Iterator[str]:
    """The commands that are typed next, most likely."""
    if state.phase == "succeeded":
        if state.model:
            yield f"see  topwork models show {state.model.rstrip('/')}"
        return
    yield f"logs    {where.command(f'logs {state.run}', *([] if state.is_over else ['-f']))}"
    if not state.is_over:
        yield f"follow  {where.command(f'status {state.run}', '--follow')}"
        yield f"stop    {where.command(f'cancel {state.run}')}"
