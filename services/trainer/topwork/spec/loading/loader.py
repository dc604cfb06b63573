"""Reading job specs from YAML, with all that is wrong in all documents told at once."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.overrides import Applied, Override, apply_overrides, parse_overrides
from topwork.spec.loading.problems import Problem, WrongSpec, dotted, findings
from topwork.spec.loading.yaml_document import MOST_CHARACTERS, Document, read_documents
from topwork.spec.messages import shown

# A character of UTF-8 has at most 4 bytes.
MOST_BYTES = 4 * MOST_CHARACTERS
STANDARD_INPUT = Path("-")
STANDARD_INPUT_NAME = "standard input"


def read_files(
    paths: Iterable[Path], overrides: Sequence[str] = (), defaults: SpecDefaults | None = None
) -> list[tuple[Path, TransferJob]]:
    """Read all jobs of several YAML files; see `read_jobs`.

    Args:
        paths: Files; `-` is standard input.
        overrides: `PATH=VALUE` each, set in every document of every file before it is checked.
        defaults: What is taken where a document says nothing; overrides come after it.

    Returns:
        Each job with its file, in the order in which they stand.

    Raises:
        WrongSpec: With all that is wrong in all files, or with all overrides that can't be read.
    """
    wanted = parse_overrides(overrides)
    jobs: list[tuple[Path, TransferJob]] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            jobs += [(path, job) for job in read_jobs(path, wanted, defaults)]
        except WrongSpec as error:
            problems += error.problems
    if problems:
        raise WrongSpec(tuple(problems))
    return jobs


def read_jobs(
    path: Path, overrides: Sequence[Override] = (), defaults: SpecDefaults | None = None
) -> list[TransferJob]:
    """Read all jobs of a YAML file.

    Args:
        path: File with one or more documents; `-` is standard input.
        overrides: Values that are set in every document before it is checked.
        defaults: As in `read_files`.

    Returns:
        The jobs in the order in which they stand; at least one.

    Raises:
        WrongSpec: With all that is wrong in all documents, or with why the file can't be read.
    """
    if path == STANDARD_INPUT:
        return read_bytes(sys.stdin.buffer.read(MOST_BYTES + 1), STANDARD_INPUT_NAME, overrides, defaults)
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        raise _whole(str(path), "is a folder. Name the YAML files in it.") from None
    except FileNotFoundError:
        raise _whole(str(path), "is not there. Check the path.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _whole(str(path), f"can't be read: {reason}.") from None
    return read_bytes(data, str(path), overrides, defaults)


def read_bytes(
    data: bytes, name: str, overrides: Sequence[Override] = (), defaults: SpecDefaults | None = None
) -> list[TransferJob]:
    """Read all jobs of what a file holds; see `read_jobs`.

    Args:
        data: Content of a YAML file.
        name: Name of the file in messages.
        overrides: As in `read_jobs`.
        defaults: As in `read_files`.

    Returns:
        The jobs in the order in which they stand; at least one.

    Raises:
        WrongSpec: With all that is wrong.
    """
    if len(data) > MOST_BYTES:
        raise _whole(name, f"holds more than {MOST_BYTES} bytes, which no spec does.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _whole(name, "is UTF-16. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"the byte 0x{data[error.start]:02x} is no UTF-8. Is this a YAML file? If so, save it as UTF-8."
        raise WrongSpec((Problem(name, line, column, "", message),)) from None
    return read_text(text, name, overrides, defaults)


def read_text(
    text: str, name: str, overrides: Sequence[Override] = (), defaults: SpecDefaults | None = None
) -> list[TransferJob]:
    """Read all jobs of a YAML text; see `read_jobs`.

    Args:
        text: One or more YAML documents.
        name: Name of the file in messages.
        overrides: As in `read_jobs`.
        defaults: As in `read_files`.

    Returns:
        The jobs in the order in which they stand; at least one.

    Raises:
        WrongSpec: With all that is wrong.
    """
    jobs: list[TransferJob] = []
    problems: list[Problem] = []
    for document in read_documents(text):
        # Nothing between two --- is what templates leave behind.
        if document.data is not None or document.faults:
            problems += _Checking(name, overrides, defaults).problems(document, jobs)
    if problems:
        raise WrongSpec(tuple(problems))
    if not jobs:
        raise _whole(name, "holds no job. A spec begins with apiVersion: topwork.dev/v1alpha1.")
    return jobs


@dataclass(frozen=True)
class _Checking:
    """How the documents of a text are checked: with what is set in them, and what they take where they say nothing."""

    name: str
    overrides: Sequence[Override]
    defaults: SpecDefaults | None

    def problems(self, document: Document, jobs: list[TransferJob]) -> Iterator[Problem]:
        """Check one document; a good one is added to the jobs."""
        found = [Problem(self.name, *fault.place, dotted(fault.path), fault.message) for fault in document.faults]
        if isinstance(document.data, dict):
            data, filled = self.defaults.fill(document.data) if self.defaults else (document.data, set())
            applied = apply_overrides(data, self.overrides, self.name)
            found += applied.problems or self._refused(document, applied, filled, jobs)
        elif not found:
            message = f"{shown(document.data)} is no job. A job is a mapping that begins with apiVersion."
            found.append(Problem(self.name, *document.place(()), "", message))
        yield from sorted(found, key=lambda problem: (problem.line, problem.column))

    def _refused(
        self, document: Document, applied: Applied, filled: set[tuple[str | int, ...]], jobs: list[TransferJob]
    ) -> Iterator[Problem]:
        """Say what is wrong with the values, each at its place in the file, on the command line or in the defaults."""
        broken = {fault.path for fault in document.faults}
        try:
            jobs.append(TransferJob.model_validate(applied.data, by_alias=True, by_name=False))
        except ValidationError as error:
            for path, message, at_key in findings(error, applied.data):
                # What could not be read is missing afterwards: that has been said.
                if any(path[: len(above)] == above for above in broken):
                    continue
                if override := applied.origin(path):
                    yield override.problem(path, message)
                elif self.defaults and any(path[: len(above)] == above for above in filled):
                    yield Problem(self.defaults.source, 0, 0, dotted(path), message)
                else:
                    yield Problem(self.name, *document.place(path, key=at_key), dotted(path), message)


def _whole(name: str, message: str) -> WrongSpec:
    return WrongSpec((Problem(name, 0, 0, "", message),))
