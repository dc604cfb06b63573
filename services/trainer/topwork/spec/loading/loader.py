"""Reads job and search specs from YAML files and reports all problems of all documents together."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import ValidationError

from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SpecDefaults
from topwork.spec.loading.overrides import AppliedOverrides, Override, apply_overrides, parse_overrides
from topwork.spec.loading.problems import InvalidSpecError, Problem, explain_errors, format_path
from topwork.spec.loading.yaml_document import MAX_CHARACTERS, Document, Position, read_documents
from topwork.spec.messages import format_value, nearest_word
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import name_template_keys

# A UTF-8 character has at most 4 bytes.
MAX_BYTES = 4 * MAX_CHARACTERS
STANDARD_INPUT = Path("-")
STANDARD_INPUT_NAME = "standard input"
Spec = TransferJob | TransferSearch
S = TypeVar("S", bound=Spec)
Model = type[TransferJob] | type[TransferSearch]
OverridesOf = Callable[[Model], Sequence[Override]]
# Commands that accept the other kind of spec.
OTHER_KIND = {
    TransferJob: "is a TransferJob: run it with topwork run FILE.",
    TransferSearch: "is a TransferSearch: run it with topwork search FILE, or topwork submit FILE.",
}


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
    return _job_reader(parse_overrides(overrides), defaults).read_files(paths)


def read_searches(
    paths: Iterable[Path], overrides: Sequence[str] = (), defaults: SpecDefaults | None = None
) -> list[tuple[Path, TransferSearch]]:
    """Read all searches from several YAML files; otherwise as `read_files`."""
    parsed = parse_overrides(overrides, TransferSearch)
    return _Reader[TransferSearch]((TransferSearch,), lambda _: parsed, defaults).read_files(paths)


def read_specs(
    paths: Iterable[Path], overrides: Sequence[str] = (), defaults: SpecDefaults | None = None
) -> list[tuple[Path, Spec]]:
    """Read all jobs and searches from several YAML files; otherwise as `read_files`."""
    reader = _Reader[Spec]((TransferJob, TransferSearch), lambda model: parse_overrides(overrides, model), defaults)
    return reader.read_files(paths)


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
    return _job_reader(overrides, defaults).read_file(path)


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
    return _job_reader(overrides, defaults).read_bytes(data, name)


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
    return _job_reader(overrides, defaults).read_text(text, name)


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
    return _job_reader((), defaults).read_data(data)


def read_search_data(data: Mapping[str, Any], defaults: SpecDefaults | None = None) -> TransferSearch:
    """Read a search from plain data, such as a custom resource; otherwise as `read_data`."""
    return _Reader[TransferSearch]((TransferSearch,), lambda _: (), defaults).read_data(data)


def _job_reader(overrides: Sequence[Override], defaults: SpecDefaults | None) -> "_Reader[TransferJob]":
    return _Reader((TransferJob,), lambda _: overrides, defaults)


@dataclass(frozen=True)
class _Reader(Generic[S]):
    """Reads specs of some kinds.

    Attributes:
        models: Model of each kind.
        overrides: Returns the overrides of documents of a kind.
        defaults: Values for keys that a document does not set.
    """

    models: tuple[Model, ...]
    overrides: OverridesOf
    defaults: SpecDefaults | None

    def read_files(self, paths: Iterable[Path]) -> list[tuple[Path, S]]:
        specs: list[tuple[Path, S]] = []
        problems: list[Problem] = []
        for path in paths:
            try:
                specs += [(path, spec) for spec in self.read_file(path)]
            except InvalidSpecError as error:
                problems += error.problems
        if problems:
            raise InvalidSpecError(tuple(problems))
        return specs

    def read_file(self, path: Path) -> list[S]:
        if path == STANDARD_INPUT:
            return self.read_bytes(sys.stdin.buffer.read(MAX_BYTES + 1), STANDARD_INPUT_NAME)
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
        return self.read_bytes(data, str(path))

    def read_bytes(self, data: bytes, name: str) -> list[S]:
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
        return self.read_text(text, name)

    def read_text(self, text: str, name: str) -> list[S]:
        specs: list[S] = []
        problems: list[Problem] = []
        for document in read_documents(text):
            # Templates often leave empty documents between two ---.
            if document.data is not None or document.issues:
                problems += self._validate(document, name, specs)
        if problems:
            raise InvalidSpecError(tuple(problems))
        if not specs:
            raise _file_error(name, "contains no job. A spec starts with apiVersion: topwork.dev/v1alpha1.")
        return specs

    def read_data(self, data: Mapping[str, Any]) -> S:
        specs: list[S] = []
        if problems := self._validate(Document(data, values={(): Position(0, 0)}), "", specs):
            raise InvalidSpecError(tuple(problems))
        return specs[0]

    def _validate(self, document: Document, name: str, specs: list[S]) -> list[Problem]:
        """Append the spec of a valid document to `specs`, or return its problems in the order of their positions."""
        problems = [Problem(name, *issue.position, format_path(issue.path), issue.message) for issue in document.issues]
        if isinstance(document.data, dict):
            problems += self._validate_mapping(document, name, specs)
        elif not problems:
            message = f"{format_value(document.data)} is not a job. A job is a mapping that starts with apiVersion."
            problems.append(Problem(name, *document.position(()), "", message))
        return sorted(problems, key=lambda problem: (problem.line, problem.column))

    def _validate_mapping(self, document: Document, name: str, specs: list[S]) -> Iterator[Problem]:
        model = _model_of(document.data)
        if model not in self.models:
            if document.data.get("kind") == model.__name__:
                yield Problem(name, *document.position(("kind",)), "kind", OTHER_KIND[model])
                return
            model = self.models[0]
        data, filled = self.defaults.fill(document.data) if self.defaults else (document.data, set())
        try:
            applied = apply_overrides(data, self.overrides(model), name)
        except InvalidSpecError as error:
            yield from error.problems
            return
        yield from applied.problems or self._validate_values(document, name, model, applied, filled, specs)

    def _validate_values(
        self,
        document: Document,
        name: str,
        model: Model,
        applied: AppliedOverrides,
        filled: set[tuple[str | int, ...]],
        specs: list[S],
    ) -> Iterator[Problem]:
        """Locate each invalid value: in the file, on the command line or in the defaults."""
        unreadable = {issue.path for issue in document.issues}
        try:
            specs.append(cast("S", model.model_validate(applied.data, by_alias=True, by_name=False)))
        except ValidationError as error:
            for path, message, at_key in map(name_template_keys, explain_errors(error, applied.data, model)):
                # A value that could not be read looks like a missing one, but is already reported.
                if any(path[: len(prefix)] == prefix for prefix in unreadable):
                    continue
                if override := applied.origin(path):
                    yield override.problem(path, message)
                elif self.defaults and any(path[: len(prefix)] == prefix for prefix in filled):
                    yield Problem(self.defaults.source, 0, 0, format_path(path), message)
                else:
                    yield Problem(name, *document.position(path, key=at_key), format_path(path), message)


KINDS: dict[str, Model] = {"TransferJob": TransferJob, "TransferSearch": TransferSearch}


def _model_of(data: Mapping[str, Any]) -> Model:
    """Return the model that a document is probably meant to have."""
    kind = data.get("kind")
    return KINDS[(nearest_word(kind, KINDS) if isinstance(kind, str) else None) or "TransferJob"]


def _file_error(name: str, message: str) -> InvalidSpecError:
    return InvalidSpecError((Problem(name, 0, 0, "", message),))
