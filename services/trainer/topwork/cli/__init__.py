"""The command `topwork`: one module for each group of commands; here they are gathered and exit codes are picked."""

import sys
from typing import Annotated

import typer

from topwork import __version__
from topwork.cli.models import app as models
from topwork.cli.predict import predict
from topwork.cli.run import run
from topwork.cli.schema import schema
from topwork.cli.validate import validate
from topwork.errors import TopworkError

app = typer.Typer(
    help="Transfer learning for image classifiers: one YAML job spec in, an evaluated model in object storage out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(run)
app.command()(validate)
app.command()(schema)
app.command()(predict)
app.add_typer(models, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"topwork {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that come before the command."""


def main() -> None:
    """Run the command line; a user's mistake ends with a sentence, a bug with its traceback."""
    try:
        app()
    except TopworkError as error:
        print(f"topwork: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
