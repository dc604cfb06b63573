"""The option `--set`, for every command that takes job specs."""

import shlex
from collections.abc import Iterable
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Set a value in all specs, such as spec.transfer.epochs=2; several allowed. VALUE is YAML, null takes the "
        "key out, and list items go by number: spec.evaluate.gates.0.atLeast=0.9.",
        show_default=False,
    ),
]


def as_options(overrides: Iterable[str]) -> list[str]:
    """Write overrides as a shell takes them, for a command that is shown."""
    return [f"--set {shlex.quote(override)}" for override in overrides]
