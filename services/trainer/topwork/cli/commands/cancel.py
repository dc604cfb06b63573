"""`topwork cancel`: stop a run and delete its Kubernetes objects."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import As, Context, Kubeconfig, Namespace, open_cluster
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.cli.output.follow import ConnectionOptions
    from topwork.clients.kubernetes import KubernetesObject
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.operations.run_lookup import RunMatch
    from topwork.cluster.status.run_status import RunStatus


def cancel(
    name: Annotated[str, typer.Argument(help="Name of a job, for its newest run, of a run, or of a search.")],
    now: Annotated[
        bool, typer.Option("--now", help="Kill its pods immediately: progress since the last checkpoint is lost.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
) -> None:
    """Stop a run with a checkpoint, and delete its Kubernetes objects; its data in storage is kept.

    A search is stopped with all its trials. A TransferJob remains, with the state Cancelled, and is not run again if a
    GitOps tool applies it again. If you submit the same spec again, it resumes from the checkpoint. Exit codes: 0
    everything is deleted, or the TransferJob or search is canceled; 2 no such run, or the cluster rejected a request;
    75 an object is not deleted in time, or the controller or the API server does not respond; 130 after Ctrl-C, which
    does not stop the cancellation.
    """
    cluster = open_cluster(namespace, context, kubeconfig)
    from topwork.cli.output.follow import INTERRUPTED, ConnectionOptions
    from topwork.cluster.operations.cancel import find_run_to_cancel
    from topwork.cluster.operations.transfer_searches import find_search

    if as_kind is None and (search := find_search(cluster, name)):
        _cancel_search(cluster, search, ConnectionOptions(cluster.namespace, context, kubeconfig))
        return
    match = find_run_to_cancel(cluster, name, as_kind)
    try:
        if match.transfer_job is not None:
            _cancel_transfer_job(cluster, match, now)
        else:
            _cancel_jobs(cluster, match, now)
    except KeyboardInterrupt:
        command = ConnectionOptions(cluster.namespace, context, kubeconfig).command(f"status {match.run}")
        print(f"\nThe cancellation continues in the cluster. Check it with: {command}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def _cancel_search(cluster: "Cluster", search: "KubernetesObject", connection: "ConnectionOptions") -> None:
    from topwork.cli.output.follow import INTERRUPTED
    from topwork.cluster.operations.transfer_searches import cancel_search
    from topwork.cluster.status.objects import name_of

    name, namespace = name_of(search), cluster.namespace
    print(f"canceling transfersearch/{name} in namespace {namespace}", flush=True)
    try:
        status = cancel_search(cluster, search, _print_line)
    except KeyboardInterrupt:
        command = connection.command(f"status transfersearch/{name}")
        print(f"\nThe cancellation continues in the cluster. Check it with: {command}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    if status.state == "Cancelled":
        print(f"transfersearch/{name} is canceled. If you submit the same spec again, it continues.")
    else:
        print(f"transfersearch/{name} was {status.state.lower()} before it was canceled")
    print(f"To delete it with its trials: kubectl delete transfersearch {name} -n {namespace}")


def _cancel_jobs(cluster: "Cluster", match: "RunMatch", now: bool) -> None:
    from topwork.cluster.operations.cancel import Cancellation

    status = _read_status(cluster, match)
    print(f"canceling {match.run} in namespace {cluster.namespace}{_describe_status(status)}", flush=True)
    Cancellation(cluster, match.run, now, _print_line).cancel()
    print(f"{match.run} is canceled: all its objects are deleted")
    for line in _describe_consequences(status, now):
        print(line)


def _cancel_transfer_job(cluster: "Cluster", match: "RunMatch", now: bool) -> None:
    from topwork.cluster.operations.cancel import TransferJobCancellation
    from topwork.cluster.operations.run_lookup import find_run, read_run

    assert match.transfer_job is not None
    name, uid = match.transfer_job["metadata"]["name"], match.transfer_job["metadata"]["uid"]
    namespace, status = cluster.namespace, read_run(cluster, match)
    delete = f"To delete the TransferJob: kubectl delete transferjob {name} -n {namespace}"
    if not match.run:
        raise SettingError(f"transferjob/{name} in namespace {namespace} has no run to cancel. {delete}")
    if status.is_finished:
        print(f"nothing to cancel: {match.run} in namespace {namespace}{_describe_status(status)}")
    else:
        print(f"canceling {match.run} in namespace {namespace}{_describe_status(status)}", flush=True)
        TransferJobCancellation(cluster, match.run, now, _print_line, uid=uid, name=name).cancel()
        end = read_run(cluster, find_run(cluster, name))
        was_finished = end.run == match.run and end.phase in {"succeeded", "failed"}
        print(f"{match.run} {end.phase} before it was canceled" if was_finished else f"{match.run} is canceled")
        status = end if was_finished else status
    for line in (*_describe_consequences(status, now), delete):
        print(line)


def _print_line(line: str) -> None:
    print(line, flush=True)


def _read_status(cluster: "Cluster", match: "RunMatch") -> "RunStatus | None":
    """Read the status of the run; None if only its ConfigMap still exists."""
    from topwork.cluster.operations.runs import read_run_objects
    from topwork.cluster.status.run_status import read_run_status

    objects = read_run_objects(cluster, match.run)
    return read_run_status(objects) if objects.jobs else None


def _describe_status(status: "RunStatus | None") -> str:
    if status is None:
        return ", of which only the ConfigMap is left"
    if status.phase == "succeeded":
        return ", which was already complete"
    if status.phase == "cancelled":
        return ", which was already canceled"
    if status.phase == "failed":
        return f", which had failed: {status.error}" if status.error else ", which had failed"
    return f", which was {status.phase}" + (f" ({status.stage})" if status.stage else "")


def _describe_consequences(status: "RunStatus | None", now: bool) -> list[str]:
    """Describe which results are kept, what progress is lost, and how to resume."""
    if status is None:
        return []
    if status.phase == "succeeded":
        return [f"Its model is kept at {status.model}"] if status.model else ["Its model is kept in storage."]
    is_lost = now and not status.is_finished and status.running_container
    lost = ["Its progress since the last checkpoint is lost."] if is_lost else []
    if_any = "" if status.attempts else ", if there is one"
    return [*lost, f"If you submit the same spec again, it resumes from its last checkpoint{if_any}."]
