"""`topwork render`: print the Kubernetes objects that `topwork submit` would apply."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.job_files import read_and_render
from topwork.cli.options import Image, Overrides
from topwork.cluster.manifests.render import RenderOptions
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
        str | None,
        typer.Option("--namespace", "-n", help="Namespace of all objects [default: that of the spec, or of kubectl]."),
    ] = None,
    output: Annotated[Format, typer.Option("--output", "-o", help="YAML documents, or one List.")] = Format.yaml,
) -> None:
    """Print what submit would apply, as input for kubectl: a ConfigMap and the Jobs of each spec."""
    jobs = read_and_render(files, RenderOptions(image, namespace), overrides or ()).jobs
    objects = [obj for job in jobs for obj in job.rendered.objects]
    if output is Format.json:
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}, indent=2, ensure_ascii=False))
    else:
        sys.stdout.write(dump_yaml(objects))
