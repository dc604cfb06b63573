"""Job specs as they are rendered: all of all files, or all that is wrong with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from topwork.cluster.rendering import Placement, Rendered, render
from topwork.errors import SpecError
from topwork.spec import TransferJob
from topwork.spec.defaults import SpecDefaults
from topwork.spec.problems import Problem, WrongSpec
from topwork.spec.reading import STANDARD_INPUT, STANDARD_INPUT_NAME, read_files

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
            found.append(RenderedJob(path, job, render(job, placement), tuple(overrides)))
        except SpecError as error:
            problems += [Problem(name, 0, 0, "", line) for line in str(error).splitlines()]
        if first := files_of_runs.get(job.run):
            problems.append(Problem(name, 0, 0, "", SAME_RUN.format(run=job.run, first=first)))
        files_of_runs[job.run] = name
    if problems:
        raise WrongSpec(tuple(problems))
    return found
