"""`topwork metrics`: delete the metrics of finished runs from a Pushgateway."""

from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import Overrides
from topwork.errors import SettingError

app = typer.Typer(help="Manage the metrics of finished runs.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Manage the metrics of finished runs."""


@app.command("delete")
def delete_run(
    run: Annotated[str | None, typer.Argument(help="Name of the run, such as cats-vs-dogs-0f1e2d3c.")] = None,
    pushgateway: Annotated[str | None, typer.Option(help="URL of the Pushgateway, http(s)://host:port.")] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="Job specs that name job and Pushgateway; - reads standard input."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Delete the outcome of a run from a Pushgateway, which otherwise keeps it forever.

    A job spec selects the only run of its job of which the Pushgateway has an outcome: the name of a run depends on the
    dataset, too. If there are several, they are listed, and nothing is deleted.

    Exit codes: 0 it is deleted, or did not exist; 2 wrong arguments; 75 the Pushgateway can't be reached or rejects the
    request.
    """
    from topwork.clients.prometheus.pushgateway import delete_outcome

    if bool(run) == bool(files):
        raise SettingError("Pass either the name of a run, or job specs with --file.")
    selected = [(run, _require_gateway(pushgateway, run))] if run else _find_runs(pushgateway, files or [], overrides)
    for name, gateway in selected:
        if delete_outcome(gateway, name):
            typer.echo(f"Deleted {name} from {gateway}.")
        else:
            typer.echo(f"{gateway} has no metrics of {name}.")


def _find_runs(pushgateway: str | None, files: list[Path], overrides: list[str] | None) -> list[tuple[str, str]]:
    """Return the run of each job with its Pushgateway; the name of the job itself if there is none."""
    from topwork.clients.prometheus.pushgateway import list_outcomes
    from topwork.spec.loading.loader import read_files

    found = []
    for _, job in read_files(files, overrides or ()):
        name = job.metadata.name
        gateway = _require_gateway(pushgateway or job.spec.metrics.pushgateway, name)
        runs = list_outcomes(gateway, name)
        if len(runs) > 1:
            raise SettingError(
                f"{gateway} has metrics of {len(runs)} runs of {name}: {', '.join(runs)}. Nothing was deleted. Pass "
                f"the name of one: topwork metrics delete {runs[0]} --pushgateway {gateway}"
            )
        found.append((runs[0] if runs else name, gateway))
    return found


def _require_gateway(gateway: str | None, name: str) -> str:
    if not gateway:
        raise SettingError(
            f"The Pushgateway of {name} is unknown. Pass --pushgateway http://host:port, or a job spec with "
            "spec.metrics.pushgateway as --file."
        )
    return gateway
