"""`topwork validate` and `topwork schema`: checking job specs and printing their JSON Schema."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import Overrides
from topwork.spec.loading.loader import read_files


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
) -> None:
    """Validate job specs and print the digest of each: specs with the same digest do the same.

    All problems of all files are reported together, with their line and column.
    """
    for path, job in read_files(files, overrides or ()):
        print(f"{path}: TransferJob {job.metadata.name} ok (digest {job.digest[:8]})")


def schema() -> None:
    """Print the JSON Schema of the job spec."""
    from topwork.spec.schema.json_schema import schema_text

    sys.stdout.write(schema_text())
