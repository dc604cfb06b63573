"""`topwork status` and `topwork list`: show one run in detail, or all runs as a table."""

import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import As, Context, Kubeconfig, Namespace, open_cluster
from topwork.cluster.names import RunKind
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.cli.output.follow import ConnectionOptions
    from topwork.clients.kubernetes import KubernetesObject
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.operations.run_lookup import RunMatch
    from topwork.cluster.status.run_status import RunStatus

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def status(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="Name of a job, for its newest run, of a run, or of a search; without it, all."
        ),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
    as_json: Json = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the run until it is finished; exit with its exit code.")
    ] = False,
) -> None:
    """Show the status of a run: stages, epochs, best metric, attempts, why it is pending or failed, and its model URI.

    A TransferJob is shown by its Job, or by its own status if it has none: if it is pending, suspended or canceled, if
    its spec is not accepted, or if its finished Job was deleted.

    The exit code is 0 regardless of the status of the run, 2 if there is no such run, and 75 if the API server does not
    respond; with --follow, it is the exit code of the run. With --json: job, run, namespace, phase (pending, pulling
    ahead, running, stopping, succeeded, failed, suspended or cancelled), stage, epoch, epochs, metric, value, model,
    weightsFrom, exitCode, reason, error, created, ended, node, queue, failures, retries, and attempts (pod, node,
    created, state, exitCode, error, counted, diskEviction, stages (stage, state, started, ended, exitCode, epochs,
    metric, value, error)); for a TransferJob also transferJob, its status in the cluster. Unknown values are null; keys
    are never removed or renamed.

    A run on several nodes also has nodes, their number, and each of its attempts, which are the pods of all nodes, has
    index, the index of its node; node is the name of the machine. Stage, epochs, metric and model are those of node 0;
    failures counts attempts of all nodes together.

    Of a search, the number of trials by state, the best trial with its parameters, and the model are shown; with
    --json, name, namespace and the status of the TransferSearch.
    """
    if follow and (name is None or as_json):
        raise SettingError("--follow requires the name of a job or run, and can't be combined with --json.")
    cluster = open_cluster(namespace, context, kubeconfig)
    if name is None:
        _print_runs(cluster, lambda _: cluster, as_json=as_json, kind=as_kind)
        return
    from topwork.cli.output import follow as following
    from topwork.cli.output import status_printer
    from topwork.cluster.operations.run_lookup import find_run
    from topwork.cluster.operations.transfer_searches import find_search

    connection = following.ConnectionOptions(cluster.namespace, context, kubeconfig)
    if as_kind is None and (search := find_search(cluster, name)):
        _show_search(cluster, search, connection, as_json=as_json, follow=follow)
        return
    match = find_run(cluster, name, as_kind)
    if follow:
        raise typer.Exit(_follow(cluster, match, connection))
    run_status = _read_status(cluster, match)
    if as_json:
        print(json.dumps(status_printer.status_to_json(run_status), indent=2))
        return
    for line in status_printer.format_details(run_status, match.others):
        print(line)
    print()
    for line in _next_commands(run_status, connection):
        print(line)


def list_runs(
    namespace: Namespace = None,
    all_namespaces: Annotated[
        bool, typer.Option("--all-namespaces", "-A", help="Include the runs of all namespaces.")
    ] = False,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
    as_json: Json = False,
) -> None:
    """List the searches and runs in the cluster, newest first.

    With --json, prints a list of what topwork status --json prints for each run. Searches are not included, because
    they have other keys: use topwork status ts/NAME --json, or kubectl get transfersearches -o json.
    """
    cluster = open_cluster(namespace, context, kubeconfig)

    def connect_to(other: str) -> "Cluster":
        return cluster if other == cluster.namespace else open_cluster(other, context, kubeconfig)

    _print_runs(cluster, connect_to, as_json=as_json, all_namespaces=all_namespaces, kind=as_kind)


def _print_runs(
    cluster: "Cluster",
    connect_to: Callable[[str], "Cluster"],
    *,
    as_json: bool,
    all_namespaces: bool = False,
    kind: RunKind | None = None,
) -> None:
    from topwork.cli.output import status_printer, transfer_search
    from topwork.cluster.operations import runs
    from topwork.cluster.operations.transfer_searches import list_searches

    found = runs.list_runs(cluster, all_namespaces=all_namespaces, kind=kind)
    searches = [] if as_json or kind else list_searches(cluster, all_namespaces=all_namespaces)
    if found.note:
        print(f"Note: {found.note}", file=sys.stderr)
    statuses = runs.add_epoch_progress(found.statuses, connect_to)
    if as_json:
        print(json.dumps([status_printer.status_to_json(run_status) for run_status in statuses], indent=2))
        return
    for line in transfer_search.format_searches(searches, show_namespace=all_namespaces) if searches else ():
        print(line)
    if searches and statuses:
        print()
    if statuses:
        for line in status_printer.format_runs(statuses, show_namespace=all_namespaces):
            print(line)
    elif not searches:
        scope = "any namespace" if all_namespaces else f"namespace {cluster.namespace}"
        print(f"No runs found in {scope}.", file=sys.stderr)


def _show_search(
    cluster: "Cluster", search: "KubernetesObject", connection: "ConnectionOptions", *, as_json: bool, follow: bool
) -> None:
    from topwork.cli.output import transfer_search
    from topwork.cluster.status.objects import name_of

    if follow:
        raise typer.Exit(transfer_search.follow(cluster, name_of(search), connection))
    if as_json:
        print(json.dumps(transfer_search.search_to_json(search), indent=2))
        return
    for line in (*transfer_search.format_search(search), "", *transfer_search.next_commands(search, connection)):
        print(line)


def _follow(cluster: "Cluster", match: "RunMatch", connection: "ConnectionOptions") -> int:
    from topwork.cli.output import follow as following
    from topwork.cluster.status.objects import name_of

    if match.transfer_job is not None:
        return following.follow_transfer_job(cluster, name_of(match.transfer_job), connection)
    return following.follow(cluster, match.run, connection)


def _read_status(cluster: "Cluster", match: "RunMatch") -> "RunStatus":
    from topwork.cluster.operations.run_lookup import read_run
    from topwork.cluster.operations.runs import add_epoch_progress

    return add_epoch_progress([read_run(cluster, match)], lambda _: cluster)[0]


def _next_commands(run_status: "RunStatus", connection: "ConnectionOptions") -> Iterator[str]:
    """Yield the commands that the user most likely needs next."""
    run = run_status.name
    if run_status.phase == "succeeded":
        if run_status.model:
            yield f"see  topwork models show {run_status.model.rstrip('/')}"
        return
    if run_status.phase == "cancelled":
        return
    yield f"logs    {connection.command(f'logs {run}', *([] if run_status.is_finished else ['-f']))}"
    if not run_status.is_finished:
        yield f"follow  {connection.command(f'status {run}', '--follow')}"
        yield f"stop    {connection.command(f'cancel {run}')}"
