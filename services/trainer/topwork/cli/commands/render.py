"""`topwork render`: print the Kubernetes objects that `topwork submit` would apply."""

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from topwork.cli.options import Image, Overrides
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions
from topwork.cluster.manifests.render import render as render_job
from topwork.errors import SpecError
from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.loader import STANDARD_INPUT, STANDARD_INPUT_NAME, read_files
from topwork.spec.loading.problems import InvalidSpecError, Problem
from topwork.spec.yaml_output import dump_yaml


class Format(StrEnum):
    """Output format."""

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
    """Print what submit would apply, as input for kubectl: a ConfigMap and the Jobs of each spec."""
    jobs = read_and_render(files, RenderOptions(image, namespace), overrides or ())
    objects = [obj for job in jobs for obj in job.rendered.objects]
    if output is Format.json:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2, ensure_ascii=False))
    else:
        sys.stdout.write(dump_yaml(objects))


SAME_RUN = (
    "is the same run, {run}, as {first}: the two specs differ only in keys that do not affect the result. Remove one "
    "of them, or change metadata.name."
)


class RenderedJob(NamedTuple):
    """A job, its file and overrides, its rendered objects, and why its source was not checked, if it was not."""

    path: Path
    job: TransferJob
    rendered: RenderedObjects
    overrides: tuple[str, ...] = ()
    unchecked: str = ""


def read_and_render(
    files: list[Path], options: RenderOptions, overrides: Sequence[str] = (), defaults: SpecDefaults | None = None
) -> list[RenderedJob]:
    """Read and render all jobs of some files.

    Args:
        files: Job specs; `-` is standard input.
        options: Image and namespace.
        overrides: `PATH=VALUE` items that apply to all jobs.
        defaults: Values of keys that a spec does not set.

    Returns:
        The jobs in file order, each with a different run.

    Raises:
        InvalidSpecError: If a file has problems; lists all problems of all files.
    """
    jobs: list[RenderedJob] = []
    problems: list[Problem] = []
    file_of_run: dict[str, str] = {}
    for path, job in read_files(files, overrides, defaults):
        name = STANDARD_INPUT_NAME if path == STANDARD_INPUT else str(path)
        try:
            jobs.append(RenderedJob(path, job, render_job(job, options), tuple(overrides)))
        except SpecError as error:
            problems += [Problem(name, 0, 0, "", line) for line in str(error).splitlines()]
        if first := file_of_run.get(job.run):
            problems.append(Problem(name, 0, 0, "", SAME_RUN.format(run=job.run, first=first)))
        file_of_run[job.run] = name
    if problems:
        raise InvalidSpecError(tuple(problems))
    return jobs
