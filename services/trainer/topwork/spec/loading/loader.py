"""Reads job specs from YAML files and reports all problems of all documents together."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.overrides import AppliedOverrides, Override, apply_overrides, parse_overrides
from topwork.spec.loading.problems import InvalidSpecError, Problem, explain_errors, format_path
from topwork.spec.loading.yaml_document import MAX_CHARACTERS, Document, Position, read_documents
from topwork.spec.messages import format_value

# A UTF-8 character has at most 4 bytes.
MAX_BYTES = 4 * MAX_CHARACTERS
STANDARD_INPUT = Path("-")
STANDARD_INPUT_NAME = "standard input"


def read_files(
    paths: Iterable[Path], overrides: Sequence[str] = (), defaults: SpecDefaults | None = None
) -> list[tuple[Path, TransferJob]]:
    """Read all jobs from several YAML files.

    Args:
        paths: YAML files; `-` is standard input.
        overrides: `PATH=VALUE` each, set in every document of every file before validation.
        defaults: Values for keys that a document does not set; applied before the overrides.

    Returns:
        Each job with its file, in order.

    Raises:
        InvalidSpecError: With all problems of all files, or with all overrides that cannot be parsed.

    Example:
        >>> for path, job in read_files([Path("job.yaml")], ["spec.transfer.epochs=2"]):
        ...     print(path, job.run)
    """
    parsed = parse_overrides(overrides)
    jobs: list[tuple[Path, TransferJob]] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            jobs += [(path, job) for job in read_jobs(path, parsed, defaults)]
        except InvalidSpecError as error:
            problems += error.problems
    if problems:
        raise InvalidSpecError(tuple(problems))
    return jobs


def read_jobs(
    path: Path, overrides: Sequence[Override] = (), defaults: SpecDefaults | None = None
) -> list[TransferJob]:
    """Read all jobs from a YAML file.

    Args:
        path: File with one or more documents; `-` is standard input.
        overrides: Values to set in every document before validation.
        defaults: As in `read_files`.

    Returns:
        The jobs in order; at least one.

    Raises:
        InvalidSpecError: With all problems of all documents, or with the reason why the file cannot be read.
    """
    if path == STANDARD_INPUT:
        return read_bytes(sys.stdin.buffer.read(MAX_BYTES + 1), STANDARD_INPUT_NAME, overrides, defaults)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise _file_error(str(path), "is a directory. Pass the YAML files in it instead.") from None
    except FileNotFoundError:
        raise _file_error(str(path), "does not exist. Check the path.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _file_error(str(path), f"cannot be read: {reason}.") from None
    return read_bytes(data, str(path), overrides, defaults)


def read_bytes(
    data: bytes, name: str, overrides: Sequence[Override] = (), defaults: SpecDefaults | None = None
) -> list[TransferJob]:
    """Read all jobs from the content of a YAML file.

    Args:
        data: Content of the file, in UTF-8 with or without a byte order mark.
        name: Name of the file in messages.
        overrides: As in `read_jobs`.
        defaults: As in `read_files`.

    Returns:
        The jobs in order; at least one.

    Raises:
        InvalidSpecError: With all problems.
    """
    if len(data) > MAX_BYTES:
        raise _file_error(name, f"is larger than {MAX_BYTES} bytes, the maximum size of a spec.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _file_error(name, "is encoded in UTF-16. Save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"byte 0x{data[error.start]:02x} is not valid UTF-8. If this is a YAML file, save it as UTF-8."
        raise InvalidSpecError((Problem(name, line, column, "", message),)) from None
    return read_text(text, name, overrides, defaults)


def read_text(
    text: str, name: str, overrides: Sequence[Override] = (), defaults: SpecDefaults | None = None
) -> list[TransferJob]:
    """Read all jobs from YAML text.

    Args:
        text: One or more YAML documents.
        name: Name of the file in messages.
        overrides: As in `read_jobs`.
        defaults: As in `read_files`.

    Returns:
        The jobs in order; at least one.

    Raises:
        InvalidSpecError: With all problems.
    """
    validator = _DocumentValidator(name, overrides, defaults)
    jobs: list[TransferJob] = []
    problems: list[Problem] = []
    for document in read_documents(text):
        # Templates often leave empty documents between two ---.
        if document.data is not None or document.issues:
            problems += validator.validate(document, jobs)
    if problems:
        raise InvalidSpecError(tuple(problems))
    if not jobs:
        raise _file_error(name, "contains no job. A spec starts with apiVersion: topwork.dev/v1alpha1.")
    return jobs


def read_data(data: Mapping[str, Any], defaults: SpecDefaults | None = None) -> TransferJob:
    """Read a job from plain data, such as a custom resource.

    Args:
        data: A job spec as JSON values.
        defaults: As in `read_files`.

    Returns:
        The job.

    Raises:
        InvalidSpecError: With all problems; without file, line and column.
    """
    document = Document(data, values={(): Position(0, 0)})
    jobs: list[TransferJob] = []
    if problems := _DocumentValidator("", (), defaults).validate(document, jobs):
        raise InvalidSpecError(tuple(problems))
    return jobs[0]


@dataclass(frozen=True)
class _DocumentValidator:
    """Validates the documents of a text, after filling in defaults and applying overrides."""

    name: str
    overrides: Sequence[Override]
    defaults: SpecDefaults | None

    def validate(self, document: Document, jobs: list[TransferJob]) -> list[Problem]:
        """Append the job of a valid document to `jobs`, or return its problems in the order of their positions."""
        problems = [
            Problem(self.name, *issue.position, format_path(issue.path), issue.message) for issue in document.issues
        ]
        if isinstance(document.data, dict):
            data, filled = self.defaults.fill(document.data) if self.defaults else (document.data, set())
            applied = apply_overrides(data, self.overrides, self.name)
            problems += applied.problems or self._validate_values(document, applied, filled, jobs)
        elif not problems:
            message = f"{format_value(document.data)} is not a job. A job is a mapping that starts with apiVersion."
            problems.append(Problem(self.name, *document.position(()), "", message))
        return sorted(problems, key=lambda problem: (problem.line, problem.column))

    def _validate_values(
        self, document: Document, applied: AppliedOverrides, filled: set[tuple[str | int, ...]], jobs: list[TransferJob]
    ) -> Iterator[Problem]:
        """Locate each invalid value: in the file, on the command line or in the defaults."""
        unreadable = {issue.path for issue in document.issues}
        try:
            jobs.append(TransferJob.model_validate(applied.data, by_alias=True, by_name=False))
        except ValidationError as error:
            for path, message, at_key in explain_errors(error, applied.data):
                # A value that could not be read looks like a missing one, but is already reported.
                if any(path[: len(prefix)] == prefix for prefix in unreadable):
                    continue
                if override := applied.origin(path):
                    yield override.problem(path, message)
                elif self.defaults and any(path[: len(prefix)] == prefix for prefix in filled):
                    yield Problem(self.defaults.source, 0, 0, format_path(path), message)
                else:
                    yield Problem(self.name, *document.position(path, key=at_key), format_path(path), message)


def _file_error(name: str, message: str) -> InvalidSpecError:
    return InvalidSpecError((Problem(name, 0, 0, "", message),))
