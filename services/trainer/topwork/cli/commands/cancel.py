"""`topwork cancel`: end a run and take it out of the cluster."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, Namespace, open_cluster

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.status.run_state import RunState


def cancel(
    name: Annotated[str, typer.Argument(help="Name of a job, for its newest run, or of a run.")],
    now: Annotated[
        bool, typer.Option("--now", help="Give its pods no time: the work since the last checkpoint is lost.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop a run with a checkpoint, and remove its Jobs, pods and ConfigMap; what is in storage stays.

    Submitted again, the same spec goes on from the checkpoint. Exit codes: 0 all is gone; 2 no such run, or the cluster
    refuses; 75 something does not go, or the API server does not answer; 130 after Ctrl-C, when cancelling goes on.
    """
    cluster = open_cluster(namespace, context, kubeconfig)
    from topwork.cli.output.follow import INTERRUPTED, Where
    from topwork.cluster.operations.cancel import Cancelling, find_cancellable

    run = find_cancellable(cluster, name)
    where = Where(cluster.namespace, context, kubeconfig)
    state = _state(cluster, run)
    print(f"cancelling {run} in namespace {cluster.namespace}{_standing(state)}", flush=True)
    try:
        Cancelling(cluster, run, now, lambda line: print(line, flush=True)).cancel()
    except KeyboardInterrupt:
        see = where.command(f"status {run}")
        print(f"\nCancelling goes on in the cluster. See how far it is with: {see}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(f"{run} is cancelled: nothing of it is left in the cluster")
    for line in _after(state, now):
        print(line)


def _state(cluster: "Cluster", run: str) -> "RunState | None":
    """How the run stands; None where only its ConfigMap is left."""
    from topwork.cluster.operations.find_runs import read_run
    from topwork.cluster.status.run_state import run_state

    objects = read_run(cluster, run)
    return run_state(objects) if objects.jobs else None


def _standing(state: "RunState | None") -> str:
    if state is None:
        return ", of which only the ConfigMap is left"
    if state.phase == "succeeded":
        return ", which was complete already"
    if state.phase == "failed":
        return f", which had failed: {state.error}" if state.error else ", which had failed"
    return f", which was {state.phase}" + (f" ({state.stage})" if state.stage else "")


def _after(state: "RunState | None", now: bool) -> list[str]:
    """What the user should know now."""
    if state is None:
        return []
    if state.phase == "succeeded":
        return [f"Its model stays at {state.model}"] if state.model else ["Its model stays in storage."]
    lost = ["The work since its last checkpoint is lost."] if now and not state.is_over and state.running else []
    has_begun = "" if state.attempts else ", if there is one"
    return [*lost, f"Submitted again, the same spec goes on from its last checkpoint{has_begun}."]
