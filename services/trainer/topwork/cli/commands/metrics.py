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
        typer.Option("--file", "-f", help="Job specs that name run and Pushgateway; - reads standard input."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Delete the outcome of a run from a Pushgateway, which otherwise keeps it forever.

    Exit codes: 0 it is deleted, or did not exist; 2 wrong arguments; 75 the Pushgateway can't be reached or rejects the
    request.
    """
    from topwork.clients.prometheus.pushgateway import delete_outcome

    for name, gateway in _select_runs(run, pushgateway, files or [], overrides):
        if delete_outcome(gateway, name):
            typer.echo(f"Deleted {name} from {gateway}.")
        else:
            typer.echo(f"{gateway} has no metrics of {name}.")


def _select_runs(
    run: str | None, pushgateway: str | None, files: list[Path], overrides: list[str] | None
) -> list[tuple[str, str]]:
    """Return each run with its Pushgateway."""
    if files and run is None:
        from topwork.spec.loading.loader import read_files

        jobs = [job for _, job in read_files(files, overrides or ())]
        runs = [(job.run, pushgateway or job.spec.metrics.pushgateway) for job in jobs]
    elif run and not files:
        runs = [(run, pushgateway)]
    else:
        raise SettingError("Pass either the name of a run, or job specs with --file.")
    if missing := [name for name, gateway in runs if not gateway]:
        raise SettingError(
            f"The Pushgateway of {', '.join(missing)} is unknown. Pass --pushgateway http://host:port, or a job spec "
            "with spec.metrics.pushgateway as --file."
        )
    return [(name, gateway) for name, gateway in runs if gateway]
