"""`topwork backbones`: list the backbones that a job can use."""

import json
from typing import Annotated, Any

import typer

from topwork.cli.output.tables import format_table
from topwork.spec.applications import APPLICATIONS, Application

COLUMNS = ("model", "input", "min", "parameters", "without top", "depth", "MB", "top-1", "top-5")


def backbones(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models that spec.model.base.application accepts: those of keras.applications, and EfficientNetLite0.

    For each model: default and minimum input size in pixels, parameters with and without the 1,000-class top, number
    of layers with weights, size of the weights, and accuracy on the ImageNet validation set. With --json: name,
    defaultSide, leastSide, scaling, parameters, parametersWithoutTop, depth, sizeMB, top1 and top5; top5 is null if
    keras.io does not list it. The scaling is that of the ImageNet weights of Keras: `topwork describe` shows that of a
    job, which differs for weights converted from PyTorch.
    """
    if as_json:
        print(json.dumps([_as_json(name, application) for name, application in APPLICATIONS.items()], indent=2))
        return
    for line in format_table(COLUMNS, rows(), gap=1):
        print(line)


def rows() -> list[tuple[str, ...]]:
    """Return the table of all models, one cell per column of `COLUMNS`."""
    return [
        (
            name,
            f"{application.default_side}",
            f"{application.min_side}",
            f"{application.parameters:,}",
            f"{application.parameters_without_top:,}",
            f"{application.depth}",
            f"{application.size_mb:.0f}",
            f"{application.top1:.1%}",
            "-" if application.top5 is None else f"{application.top5:.1%}",
        )
        for name, application in APPLICATIONS.items()
    ]


def _as_json(name: str, application: Application) -> dict[str, Any]:
    return {
        "name": name,
        "defaultSide": application.default_side,
        "leastSide": application.min_side,
        "scaling": application.scaling,
        "parameters": application.parameters,
        "parametersWithoutTop": application.parameters_without_top,
        "depth": application.depth,
        "sizeMB": application.size_mb,
        "top1": application.top1,
        "top5": application.top5,
    }
