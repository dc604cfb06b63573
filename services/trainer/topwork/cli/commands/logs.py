"""`topwork logs`: print the logs of the containers of a run."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import As, Context, Kubeconfig, Namespace, open_cluster
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from topwork.cluster.operations.logs import LogEntry


class Stage(StrEnum):
    """The stages that run in a container."""

    pull = "pull"
    transfer = "transfer"
    fine_tune = "fine-tune"


def logs(
    name: Annotated[str, typer.Argument(help="Name of a job, for its newest run, or of a run.")],
    stage: Annotated[Stage | None, typer.Option(help="Only the log of this stage.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log across containers until the run is finished.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
) -> None:
    """Print the log of a run, attempt by attempt.

    Standard output contains the lines of the containers: one JSON object per line. Standard error contains a heading
    for each container. Exit codes: 0 success; 2 no such run, it ended without a log, or the cluster rejected a request;
    75 it has not started yet, or the API server or a node does not respond; 130 after Ctrl-C, which does not stop the
    run.
    """
    cluster = open_cluster(namespace, context, kubeconfig)
    from topwork.cli.output.follow import INTERRUPTED, ConnectionOptions
    from topwork.cluster.operations.logs import RunLog
    from topwork.cluster.operations.run_lookup import find_run
    from topwork.cluster.status.objects import name_of

    match = find_run(cluster, name, as_kind)
    transfer_job = name_of(match.transfer_job) if match.transfer_job else None
    log = RunLog(cluster, match.run, stage.value if stage else None, transfer_job)
    if not follow:
        raise typer.Exit(_print(log.read()))
    options = [*(["--stage", stage.value] if stage else []), "-f"]
    command = ConnectionOptions(cluster.namespace, context, kubeconfig).command(f"logs {name}", *options)
    reattach = f"The job continues. Follow it again with: {command}"
    try:
        code = _print(log.follow())
    except KeyboardInterrupt:
        print(f"\n{reattach}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (SettingError, UnavailableError) as error:
        raise type(error)(f"{error}\n{reattach}") from error
    raise typer.Exit(code)


def _print(entries: "Iterator[LogEntry]") -> int:
    """Print a log and return the exit code: that of the first part that is missing, or 0."""
    from topwork.cluster.operations.logs import ContainerHeading, Note

    code = 0
    for entry in entries:
        if isinstance(entry, ContainerHeading):
            print(f"── {entry.pod} {entry.stage} ──", file=sys.stderr, flush=True)
        elif isinstance(entry, Note):
            print(entry.text, file=sys.stderr, flush=True)
            code = code or entry.exit_code
        else:
            print(entry, flush=True)
    return code
