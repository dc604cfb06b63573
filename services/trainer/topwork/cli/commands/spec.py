"""`topwork validate` and `topwork schema`: checking job and search specs, and printing their JSON Schema."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.options import Overrides
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_specs
from topwork.spec.messages import count_noun
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import count_combinations
from topwork.spec.search.value_checks import MAX_COUNT, search_warnings


class SpecKind(StrEnum):
    """Kinds of specs."""

    job = "TransferJob"
    search = "TransferSearch"


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Specs; - reads standard input.")],
    overrides: Overrides = None,
) -> None:
    """Validate specs of jobs and searches.

    All problems of all files are reported together, with their line and column. Prints the digest of each job: specs
    with the same digest do the same. For searches, it also warns of combinations that the spec of a job refuses.
    """
    for path, spec in read_specs(files, overrides or ()):
        if isinstance(spec, TransferSearch):
            print(f"{path}: TransferSearch {spec.metadata.name} ok ({_describe_size(spec)})")
            for warning in search_warnings(spec.spec):
                print(f"{path}: Warning: {warning}", file=sys.stderr)
        else:
            print(f"{path}: TransferJob {spec.metadata.name} ok (digest {spec.digest[:8]})")


def _describe_size(search: TransferSearch) -> str:
    trials = count_noun(search.spec.trials, "trial")
    count = count_combinations(search.spec.space, MAX_COUNT) if search.spec.sampler == "grid" else None
    return f"{trials}, {'at least ' if count == MAX_COUNT else ''}{count} combinations" if count else trials


def schema(
    kind: Annotated[SpecKind, typer.Option(help="Kind of the spec.")] = SpecKind.job,
) -> None:
    """Print the JSON Schema of job specs or search specs."""
    from topwork.spec.schema.json_schema import schema_text

    sys.stdout.write(schema_text(TransferJob if kind is SpecKind.job else TransferSearch))
