"""`topwork backbones`: list the backbones that a job can use."""

import json
from typing import Annotated, Any

import typer

from topwork.cli.output.tables import format_table
from topwork.spec.applications import APPLICATIONS, Application

COLUMNS = ("model", "input", "min", "parameters", "without top", "depth", "MB", "top-1", "top-5")


def backbones(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models of keras.applications that spec.model.base.application accepts.

    For each model: default and minimum input size in pixels, parameters with and without the 1,000-class top, number
    of layers with weights, size of the weights, and accuracy on the ImageNet validation set. With --json: name,
    defaultSide, leastSide, scaling, parameters, parametersWithoutTop, depth, sizeMB, top1 and top5; top5 is null if
    keras.io does not list it.
    """
    if as_json:
        print(json.dumps([_as_json(name, known) for name, known in APPLICATIONS.items()], indent=2))
        return
    for line in format_table(COLUMNS, rows(), gap=1):
        print(line)


def rows() -> list[tuple[str, ...]]:
    """Return the table of all models, one cell per column of `COLUMNS`."""
    return [
        (
            name,
            f"{known.default_side}",
            f"{known.min_side}",
            f"{known.parameters:,}",
            f"{known.parameters_without_top:,}",
            f"{known.depth}",
            f"{known.size_mb:.0f}",
            f"{known.top1:.1%}",
            "-" if known.top5 is None else f"{known.top5:.1%}",
        )
        for name, known in APPLICATIONS.items()
    ]


def _as_json(name: str, known: Application) -> dict[str, Any]:
    return {
        "name": name,
        "defaultSide": known.default_side,
        "leastSide": known.min_side,
        "scaling": known.scaling,
        "parameters": known.parameters,
        "parametersWithoutTop": known.parameters_without_top,
        "depth": known.depth,
        "sizeMB": known.size_mb,
        "top1": known.top1,
        "top5": known.top5,
    }
