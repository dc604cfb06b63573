"""`topwork logs`: what the containers of a run write."""

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.options import Context, Kubeconfig, Namespace, open_cluster
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from topwork.cluster.operations.logs import Note, Part


class Stage(StrEnum):
    """The stages that have a container."""

    pull = "pull"
    transfer = "transfer"
    fine_tune = "fine-tune"


def logs(
    name: Annotated[str, typer.Argument(help="Name of a job, for its newest run, or of a run.")],
    stage: Annotated[Stage | None, typer.Option(help="Only what this stage wrote.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on, from container to container, until the run is over.")
    ] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print what a run wrote, attempt by attempt.

    Lines go to standard output as the containers wrote them: JSON, one object a line. Which container they are of
    stands above them, on standard error. Exit codes: 0; 2 no such run, or the cluster refuses; 75 the API server does
    not answer; 130 after Ctrl-C, which leaves the run alone.
    """
    cluster = open_cluster(namespace, context, kubeconfig)
    from topwork.cli.output.follow import INTERRUPTED, Where
    from topwork.cluster.operations.find_runs import find_run
    from topwork.cluster.operations.logs import RunLog

    where = Where(cluster.namespace, context, kubeconfig)
    options = [*(["--stage", stage.value] if stage else []), "-f"]
    back = f"Come back with: {where.command(f'logs {name}', *options)}"
    log = RunLog(cluster, find_run(cluster, name).run, stage.value if stage else None)
    if not follow:
        _print(log.entries())
        return
    try:
        _print(log.followed())
    except KeyboardInterrupt:
        print(f"\nThe job goes on. {back}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except (SettingError, UnavailableError) as error:
        raise type(error)(f"{error} The job goes on. {back}") from error


def _print(entries: "Iterator[Part | str | Note]") -> None:
    from topwork.cluster.operations.logs import Note, Part

    for entry in entries:
        if isinstance(entry, Part):
            print(f"── {entry.pod} {entry.stage} ──", file=sys.stderr, flush=True)
        elif isinstance(entry, Note):
            print(entry.text, file=sys.stderr, flush=True)
        else:
            print(entry, flush=True)
