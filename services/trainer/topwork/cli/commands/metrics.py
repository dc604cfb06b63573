"""`topwork metrics`: what stays of runs where their metrics went."""

from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import Overrides
from topwork.errors import SettingError

app = typer.Typer(help="Metrics of runs that have ended.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _metrics() -> None:
    """Metrics of runs that have ended."""


@app.command("delete")
def delete_run(
    run: Annotated[str | None, typer.Argument(help="Name of the run, such as cats-vs-dogs-0f1e2d3c.")] = None,
    pushgateway: Annotated[str | None, typer.Option(help="Its address, http(s)://host:port.")] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--file", "-f", help="Job specs, in place of both; - reads standard input.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Delete the final outcome of a run from a Pushgateway, which keeps it for good otherwise.

    Exit codes: 0 it is gone, or was not there; 2 wrong arguments; 75 the Pushgateway can't be reached or refuses.
    """
    from topwork.clients.prometheus.pushgateway import delete

    for name, gateway in _wanted(run, pushgateway, files or [], overrides):
        if delete(gateway, name):
            typer.echo(f"Deleted {name} from {gateway}.")
        else:
            typer.echo(f"{gateway} holds nothing of {name}.")


def _wanted(
    run: str | None, pushgateway: str | None, files: list[Path], overrides: list[str] | None
) -> list[tuple[str, str]]:
    """Give each run with its Pushgateway."""
    if files and run is None:
        from topwork.spec.loading.loader import read_files

        jobs = [job for _, job in read_files(files, overrides or ())]
        found = [(job.run, pushgateway or job.spec.metrics.pushgateway) for job in jobs]
    elif run and not files:
        found = [(run, pushgateway)]
    else:
        raise SettingError("Name a run, or job specs with --file: one of both.")
    if missing := [name for name, gateway in found if not gateway]:
        raise SettingError(
            f"Nothing says which Pushgateway holds {', '.join(missing)}. Name it with --pushgateway http://host:port, "
            "or in spec.metrics.pushgateway of a job spec given with --file."
        )
    return [(name, gateway) for name, gateway in found if gateway]
