"""The reference of the job spec, as `docs/spec.md` holds it: every key with its type, default and meaning."""

import json
from collections.abc import Iterator

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from topwork.spec.job import TransferJob
from topwork.spec.schema import key_types
from topwork.spec.section import Part, rules_of

INTRODUCTION = """\
# The job spec

Every key of a `TransferJob`, generated from the models in `services/trainer/topwork/spec`. `topwork schema` prints the
same as JSON Schema, and `topwork validate FILE` checks a file against all of it, the rules that cross keys included.
A key without a default must be given; an empty default means that the key may be left out.

A digest of the spec names the run. Labels, `spec.compute` and `spec.metrics` change no result and don't count.
"""


def reference_text() -> str:
    """Write the reference.

    Returns:
        Markdown with one table for each part, in the order of the spec; the same for the same models.
    """
    sections = ["\n".join(_section(path, part)) for path, part in key_types.parts(TransferJob)]
    return "\n".join([INTRODUCTION, *sections])


def _section(path: str, part: type[Part]) -> Iterator[str]:
    yield f"## `{path}`" if path else "## TransferJob"
    yield ""
    yield (part.__doc__ or "").strip()
    yield ""
    yield "| Key | Allowed | Default | Meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in key_types.keys(part).items():
        cells = [f"`{key}`", _allowed(field), _default(field), field.description or ""]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    rules = rules_of(part)
    if rules:
        yield "Rules that cross these keys:"
        yield ""
        yield from (f"- **{check.__name__.replace('_', ' ')}**: {check.__doc__}" for check in rules)
        yield ""


def _allowed(field: FieldInfo) -> str:
    return key_types.allowed(key_types.kinds(field.annotation, field.metadata))


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if field.default is None:
        return ""
    default = field.default
    if isinstance(default, Part):
        default = default.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return f"`{json.dumps(default)}`"
