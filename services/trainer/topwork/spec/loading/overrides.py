"""`--set PATH=VALUE`: values from the command line that replace those of a document before it is validated."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from topwork.spec.job import TransferJob
from topwork.spec.loading.paths import PathError, parse_path, set_value
from topwork.spec.loading.problems import InvalidSpecError, Problem, format_path
from topwork.spec.loading.yaml_document import Path, read_documents
from topwork.spec.messages import SECRET
from topwork.spec.spec_model import SpecModel

EXAMPLE = "Use PATH=VALUE, such as spec.transfer.epochs=2."


class Override(NamedTuple):
    """One `--set` option.

    Attributes:
        text: The option's argument as written.
        path: Path of the key to set.
        value: Plain data; None removes the key.
    """

    text: str
    path: Path
    value: Any

    def problem(self, path: Path, message: str) -> Problem:
        """Create a problem that is attributed to this option."""
        return _create_problem(self.text, path, message)


class AppliedOverrides(NamedTuple):
    """A document with overrides.

    Attributes:
        data: Plain data; meaningless if there are problems.
        origins: The override that set each path, including mappings that were created for it.
        problems: Overrides that do not fit this document.
    """

    data: Any
    origins: Mapping[Path, Override]
    problems: tuple[Problem, ...]

    def origin(self, path: Path) -> Override | None:
        """Return the override that set a path or one of its parents; None if the value comes from the file."""
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        return next((self.origins[prefix] for prefix in prefixes if prefix in self.origins), None)


def parse_overrides(texts: Iterable[str], root: type[SpecModel] = TransferJob) -> tuple[Override, ...]:
    r"""Parse overrides from the command line.

    Args:
        texts: `PATH=VALUE` each. PATH is a dotted path of camelCase keys and list indices, with `\.` for a dot within
            a key. VALUE is YAML.
        root: Model of the documents that the overrides are for.

    Returns:
        The overrides in order.

    Raises:
        InvalidSpecError: With all problems of all overrides.

    Example:
        >>> parse_overrides(["spec.evaluate.gates.0.atLeast=0.9"])[0].path
        ('spec', 'evaluate', 'gates', 0, 'atLeast')
    """
    overrides, problems = [], []
    for text in texts:
        try:
            overrides.append(_parse(text, root))
        except PathError as error:
            example = "" if error.path else f" {EXAMPLE}"
            problems.append(_create_problem(text, error.path, f"{error}{example}"))
    if problems:
        raise InvalidSpecError(tuple(problems))
    return tuple(overrides)


def apply_overrides(data: Mapping[str, Any], overrides: Sequence[Override], name: str) -> AppliedOverrides:
    """Apply overrides to a document in order; later ones take precedence.

    Args:
        data: Plain data of the document; not modified.
        overrides: The overrides.
        name: Name of the file in messages.

    Returns:
        A copy of the data with the overrides applied.
    """
    result = deepcopy(dict(data))
    origins: dict[Path, Override] = {}
    problems = []
    for override in overrides:
        try:
            changed = set_value(result, override.path, override.value, name)
        except PathError as error:
            problems.append(override.problem(error.path, str(error)))
            continue
        # The new value replaces everything that earlier overrides set below this path.
        origins = {path: origin for path, origin in origins.items() if path[: len(override.path)] != override.path}
        origins.update(dict.fromkeys(changed, override))
    return AppliedOverrides(result, origins, tuple(problems))


def _parse(text: str, root: type[SpecModel]) -> Override:
    written_path, separator, value = text.partition("=")
    if not separator:
        raise PathError((), "has no =.")
    path = parse_path(written_path, root)
    return Override(text, path, _parse_value(value, path))


def _parse_value(text: str, path: Path) -> Any:
    documents = [document for document in read_documents(text) if document.values or document.issues]
    if issues := [issue for document in documents for issue in document.issues]:
        raise PathError((*path, *issues[0].path), issues[0].message)
    if not documents:
        raise PathError(path, "has no value after the =. Use null to remove the key, or '' for an empty string.")
    if len(documents) > 1:
        raise PathError(path, f"has {len(documents)} YAML documents after the =. Use a single value.")
    return documents[0].data


def _create_problem(text: str, path: Path, message: str) -> Problem:
    # The location of a problem is a single line without secrets.
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return Problem(f"--set {SECRET.sub('…', line) if '://' in line else line}", 0, 0, format_path(path), message)
