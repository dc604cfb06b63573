"""`topwork backbones`: the models that a job can stand on."""

import json
from typing import Annotated, Any

import typer

from topwork.cli.output.tables import lines
from topwork.spec.applications import APPLICATIONS, Application

COLUMNS = ("model", "input", "least", "parameters", "without top", "depth", "MB", "top-1", "top-5")


def backbones(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models of keras.applications that spec.model.base.application takes.

    For each its default and least input side in pixels, its parameters with the top of 1,000 classes and without it,
    its layers with weights, the size of its weights, and its accuracy on ImageNet's validation images. With --json:
    name, defaultSide, leastSide, scaling, parameters, parametersWithoutTop, depth, sizeMB, top1 and top5; the last is
    null where keras.io gives none.
    """
    if as_json:
        print(json.dumps([_as_json(name, known) for name, known in APPLICATIONS.items()], indent=2))
        return
    for line in lines(COLUMNS, rows(), gap=1):
        print(line)


def rows() -> list[tuple[str, ...]]:
    """Write the table of all models, a cell for each of `COLUMNS`."""
    return [
        (
            name,
            f"{known.default_side}",
            f"{known.least_side}",
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
        "leastSide": known.least_side,
        "scaling": known.scaling,
        "parameters": known.parameters,
        "parametersWithoutTop": known.parameters_without_top,
        "depth": known.depth,
        "sizeMB": known.size_mb,
        "top1": known.top1,
        "top5": known.top5,
    }
