"""The command `topwork`: one module for each group of commands; here they are gathered and exit codes are picked."""

import importlib
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from topwork import __version__
from topwork.cli.runtime.environment import prepare_process
from topwork.cli.runtime.exit_codes import BUG, failure_of
from topwork.redaction import without_secrets

COMMANDS = {
    "run": "topwork.cli.commands.run:run",
    "stage": "topwork.cli.commands.stage:stage",
    "validate": "topwork.cli.commands.spec:validate",
    "describe": "topwork.cli.commands.describe:describe",
    "render": "topwork.cli.commands.render:render",
    "submit": "topwork.cli.commands.submit:submit",
    "status": "topwork.cli.commands.status:status",
    "list": "topwork.cli.commands.status:list_runs",
    "logs": "topwork.cli.commands.logs:logs",
    "top": "topwork.cli.top.command:top",
    "cancel": "topwork.cli.commands.cancel:cancel",
    "backbones": "topwork.cli.commands.backbones:backbones",
    "schema": "topwork.cli.commands.spec:schema",
    "predict": "topwork.cli.commands.predict:predict",
    "models": "topwork.cli.commands.models:app",
    "mirror": "topwork.cli.commands.mirror:app",
    "storage": "topwork.cli.commands.storage:app",
    "metrics": "topwork.cli.commands.metrics:app",
    "gc": "topwork.cli.commands.gc:gc",
}


class Commands(TyperGroup):
    """Imports the module of a command when it is called: `validate` waits for no S3 client."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name the commands, in the order of their use."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        found = getattr(importlib.import_module(module), name)
        if not isinstance(found, typer.Typer):
            command = found
            found = typer.Typer(rich_markup_mode=None, add_completion=False)
            found.command(cmd_name)(command)
        return typer.main.get_command(found)


app = typer.Typer(
    cls=Commands,
    help="Transfer learning for image classifiers: one YAML job spec in, an evaluated model in object storage out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


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
    prepare_process()
    try:
        app()
    except Exception as error:
        known = failure_of(error)
        if known is None:
            print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
            sys.exit(BUG)
        # The problems of a spec begin with the file and the line in it, as editors read them.
        text = str(known) if getattr(known, "problems", ()) else f"topwork: {known}"
        print(without_secrets(text), file=sys.stderr)
        sys.exit(known.exit_code)
