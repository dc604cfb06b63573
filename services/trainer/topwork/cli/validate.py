"""`topwork validate`: is a job spec right, and if not, what is wrong with it and where?"""

from pathlib import Path
from typing import Annotated

import typer

from topwork.cli.overrides import Overrides
from topwork.spec.reading import read_files


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
) -> None:
    """Check job specs and name their runs; all that is wrong in all files is told at once."""
    for path, job in read_files(files, overrides or ()):
        print(f"{path}: TransferJob {job.metadata.name} ok (run {job.run})")
