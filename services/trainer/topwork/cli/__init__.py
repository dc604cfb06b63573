"""The `topwork` command: its sub-commands, logging setup, error messages and exit codes."""

import importlib
import logging
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from topwork import __version__
from topwork.cli.runtime.environment import allowed_http_hosts, register_environment_secrets
from topwork.cli.runtime.logging import configure_logging, set_log_level
from topwork.cli.runtime.shutdown import EXIT_CODE_BUG, to_topwork_error
from topwork.clients.url_policy import allow_plain_http
from topwork.errors import limit_message, limit_traceback
from topwork.redaction import redact

COMMANDS = {
    "run": "topwork.cli.commands.run:run",
    "search": "topwork.cli.commands.search:app",
    "stage": "topwork.cli.commands.stage:stage",
    "validate": "topwork.cli.commands.spec:validate",
    "describe": "topwork.cli.commands.describe:describe",
    "audit": "topwork.cli.commands.audit:audit",
    "render": "topwork.cli.commands.render:render",
    "submit": "topwork.cli.commands.submit:submit",
    "status": "topwork.cli.commands.status:status",
    "list": "topwork.cli.commands.status:list_runs",
    "logs": "topwork.cli.commands.logs:logs",
    "top": "topwork.cli.top.command:top",
    "cancel": "topwork.cli.commands.cancel:cancel",
    "controller": "topwork.cli.commands.controller:controller",
    "backbones": "topwork.cli.commands.backbones:backbones",
    "schema": "topwork.cli.commands.spec:schema",
    "crd": "topwork.cli.commands.crd:crd",
    "predict": "topwork.cli.commands.predict:predict",
    "models": "topwork.cli.commands.models:app",
    "compare": "topwork.cli.commands.compare:compare",
    "datasets": "topwork.cli.commands.datasets:app",
    "track": "topwork.cli.commands.track:app",
    "mirror": "topwork.cli.commands.mirror:app",
    "storage": "topwork.cli.commands.storage:app",
    "metrics": "topwork.cli.commands.metrics:app",
    "gc": "topwork.cli.commands.gc:gc",
}


class LazyCommands(TyperGroup):
    """Imports a command's module only when the command runs, so that `validate` does not wait for an S3 client."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of all commands, in the order of the help text."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command by its name; None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command = getattr(importlib.import_module(module), name)
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        group = typer.Typer(rich_markup_mode=None, add_completion=False)
        group.command(cmd_name)(command)
        return typer.main.get_command(group)


app = typer.Typer(
    cls=LazyCommands,
    help="Transfer learning for image classifiers: one YAML job spec in, an evaluated model in object storage out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"topwork {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log debug messages, too.")] = False,
) -> None:
    """Handle the options that precede the command."""
    if verbose:
        set_log_level(logging.DEBUG)


def main() -> None:
    """Run the command line. User errors end with a message, bugs with a traceback."""
    configure_process()
    try:
        app()
    except Exception as error:
        known = to_topwork_error(error)
        if known is None:
            print(limit_traceback(redact(traceback.format_exc())), end="", file=sys.stderr)
            sys.exit(EXIT_CODE_BUG)
        # Problems of a spec already begin with file and line, in the format that editors recognize.
        text = str(known) if getattr(known, "problems", ()) else f"topwork: {known}"
        print(limit_message(redact(text)), file=sys.stderr)
        sys.exit(known.exit_code)


def configure_process() -> None:
    """Apply the settings of the whole process: secrets to redact, hosts allowed over plain HTTP, and logging."""
    register_environment_secrets()
    allow_plain_http(allowed_http_hosts())
    configure_logging()
