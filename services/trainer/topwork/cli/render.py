"""`topwork render`: the Kubernetes objects of a job, as `submit` would apply them."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.errors import SpecError
from topwork.spec.problems import Problem, WrongSpec
from topwork.spec.reading import STANDARD_INPUT, STANDARD_INPUT_NAME, read_files

if TYPE_CHECKING:
    from topwork.cluster.rendering import Manifest, Placement

SAME_RUN = (
    "makes the objects of {run}, as {first} does: the two differ in nothing that changes the result. Leave one out, or "
    "change metadata.name."
)


class Format(StrEnum):
    """How objects are written."""

    yaml = "yaml"
    json = "json"


def render(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    image: Annotated[
        str | None,
        typer.Option(envvar="TOPWORK_IMAGE", help="Image of all containers [default: the one that make image builds]."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace of all objects [default: left to kubectl].")
    ] = None,
    output: Annotated[Format, typer.Option("--output", "-o", help="YAML documents, or one List.")] = Format.yaml,
) -> None:
    """Print what submit would apply: a ConfigMap and its Jobs for each spec, as kubectl takes them."""
    from topwork.cluster.rendering import Placement
    from topwork.spec.writing import as_yaml

    objects = _objects(files, Placement(image, namespace))
    if output is Format.json:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2, ensure_ascii=False))
    else:
        sys.stdout.write(as_yaml(objects))


def _objects(files: list[Path], placement: "Placement") -> "list[Manifest]":
    """Render all jobs of all files, or tell all that is wrong with them."""
    from topwork.cluster import rendering

    objects: list[Manifest] = []
    problems: list[Problem] = []
    files_of_runs: dict[str, str] = {}
    for path, job in read_files(files):
        name = STANDARD_INPUT_NAME if path == STANDARD_INPUT else str(path)
        try:
            objects += rendering.render(job, placement).objects
        except SpecError as error:
            problems += [Problem(name, 0, 0, "", line) for line in str(error).splitlines()]
        if first := files_of_runs.get(job.run):
            problems.append(Problem(name, 0, 0, "", SAME_RUN.format(run=job.run, first=first)))
        files_of_runs[job.run] = name
    if problems:
        raise WrongSpec(tuple(problems))
    return objects
