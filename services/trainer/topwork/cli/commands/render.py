"""`topwork render`: the Kubernetes objects of a job, as `submit` would apply them."""

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from topwork.cli.options import Image, Overrides
from topwork.cluster.manifests.render import Placement, Rendered
from topwork.cluster.manifests.render import render as render_job
from topwork.errors import SpecError
from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.loader import STANDARD_INPUT, STANDARD_INPUT_NAME, read_files
from topwork.spec.loading.problems import Problem, WrongSpec
from topwork.spec.yaml_output import as_yaml


class Format(StrEnum):
    """How objects are written."""

    yaml = "yaml"
    json = "json"


def render(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    image: Image = None,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace of all objects [default: left to kubectl].")
    ] = None,
    output: Annotated[Format, typer.Option("--output", "-o", help="YAML documents, or one List.")] = Format.yaml,
) -> None:
    """Print what submit would apply: a ConfigMap and its Jobs for each spec, as kubectl takes them."""
    found = read_and_render(files, Placement(image, namespace), overrides or ())
    objects = [manifest for each in found for manifest in each.rendered.objects]
    if output is Format.json:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2, ensure_ascii=False))
    else:
        sys.stdout.write(as_yaml(objects))


SAME_RUN = (
    "makes the objects of {run}, as {first} does: the two differ in nothing that changes the result. Leave one out, or "
    "change metadata.name."
)


class RenderedJob(NamedTuple):
    """A job of a file, with what was set in it, and its objects."""

    path: Path
    job: TransferJob
    rendered: Rendered
    overrides: tuple[str, ...] = ()


def read_and_render(
    files: list[Path], placement: Placement, overrides: Sequence[str] = (), defaults: SpecDefaults | None = None
) -> list[RenderedJob]:
    """Read all jobs of all files and render them.

    Args:
        files: Job specs; `-` is standard input.
        placement: Image and namespace.
        overrides: `PATH=VALUE` each, set in all of them.
        defaults: What is taken where a spec says nothing.

    Returns:
        The jobs in the order in which they stand, each another run.

    Raises:
        WrongSpec: With all that is wrong in all files.
    """
    found: list[RenderedJob] = []
    problems: list[Problem] = []
    files_of_runs: dict[str, str] = {}
    for path, job in read_files(files, overrides, defaults):
        name = STANDARD_INPUT_NAME if path == STANDARD_INPUT else str(path)
        try:
            found.append(RenderedJob(path, job, render_job(job, placement), tuple(overrides)))
        except SpecError as error:
            problems += [Problem(name, 0, 0, "", line) for line in str(error).splitlines()]
        if first := files_of_runs.get(job.run):
            problems.append(Problem(name, 0, 0, "", SAME_RUN.format(run=job.run, first=first)))
        files_of_runs[job.run] = name
    if problems:
        raise WrongSpec(tuple(problems))
    return found
