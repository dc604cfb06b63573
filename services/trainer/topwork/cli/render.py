"""`topwork render`: the Kubernetes objects of a job, as `submit` would apply them."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.clusters import Image
from topwork.cli.overrides import Overrides
from topwork.cli.rendered import read_and_render
from topwork.cluster.rendering import Placement
from topwork.spec.writing import as_yaml


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
