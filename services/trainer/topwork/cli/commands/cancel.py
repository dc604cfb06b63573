"""`topwork cancel`: stop a run and delete its Kubernetes objects."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, Namespace, open_cluster

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.status.run_status import RunStatus


def cancel(
    name: Annotated[str, typer.Argument(help="Name of a job, for its newest run, or of a run.")],
    now: Annotated[
        bool, typer.Option("--now", help="Kill its pods immediately: progress since the last checkpoint is lost.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop a run with a checkpoint, and delete its Jobs, pods and ConfigMap; its data in storage is kept.

    If you submit the same spec again, it resumes from the checkpoint. Exit codes: 0 everything is deleted; 2 no such
    run, or the cluster rejected a request; 75 an object is not deleted in time, or the API server does not respond; 130
    after Ctrl-C, which does not stop the cancellation.
    """
    cluster = open_cluster(namespace, context, kubeconfig)
    from topwork.cli.output.follow import INTERRUPTED, ConnectionOptions
    from topwork.cluster.operations.cancel import Cancellation, find_run_to_cancel

    run = find_run_to_cancel(cluster, name)
    status = _read_status(cluster, run)
    print(f"canceling {run} in namespace {cluster.namespace}{_describe_status(status)}", flush=True)
    try:
        Cancellation(cluster, run, now, lambda line: print(line, flush=True)).cancel()
    except KeyboardInterrupt:
        command = ConnectionOptions(cluster.namespace, context, kubeconfig).command(f"status {run}")
        print(f"\nThe cancellation continues in the cluster. Check it with: {command}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(f"{run} is canceled: all its objects are deleted")
    for line in _describe_consequences(status, now):
        print(line)


def _read_status(cluster: "Cluster", run: str) -> "RunStatus | None":
    """Read the status of the run; None if only its ConfigMap still exists."""
    from topwork.cluster.operations.runs import read_run_objects
    from topwork.cluster.status.run_status import read_run_status

    objects = read_run_objects(cluster, run)
    return read_run_status(objects) if objects.jobs else None


def _describe_status(status: "RunStatus | None") -> str:
    if status is None:
        return ", of which only the ConfigMap is left"
    if status.phase == "succeeded":
        return ", which was already complete"
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
