"""The reference of jobs and searches in `docs/spec.md`: every key with its type, default and description."""

import json
import re
from collections.abc import Iterator

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from topwork.spec.job import TransferJob
from topwork.spec.schema import key_types
from topwork.spec.search import TransferSearch
from topwork.spec.spec_model import SpecModel, get_rules

INTRODUCTION = """\
# The job spec

This reference lists every key of a `TransferJob`, and, at the [end](#transfersearch), of a `TransferSearch`. It is
generated from the models in `services/trainer/topwork/spec`. `topwork schema` prints the same information as JSON
Schema, and `topwork validate FILE` checks a file, including the rules between keys. Keys marked **required** must be
set; keys with an empty default can be left out.

The name of a run in a cluster contains a digest of everything that can change what its Job does: the spec, the images,
the file of the base, and the inputs of the splits, such as lists of images. Only values that differ from their defaults
are part of the digest. Metadata except the name, `spec.suspend`, `spec.metrics`, `spec.tracking`, and `spec.compute`
except `precision` are not. `topwork run` names a run by what its weights depend on. Results are stored by stage, and
every run with the same settings and images shares them; see [Stages and runs](training.md#stages-and-runs).

In a cluster, a `TransferJob` is a custom resource. `topwork crd` prints its definition, which is generated from the
same models, and `kubectl explain transferjob.spec` shows this reference. The API server rejects unknown keys, wrong
types, values out of bounds, and violations of many rules between keys, with the messages of `topwork validate`. It
cannot read keys that allow several types, such as `splits`, `classes` or `unfreeze`: the controller checks their rules,
and reports all errors in the condition `Accepted`. The API server adds defaults, except those of `storage`, `compute`
and `metrics`, which the ConfigMap `topwork-defaults` of the namespace may set, and removes keys that are `null`.
kubectl and Helm read the words on and off as booleans unless they are quoted; both are accepted.
"""

SEARCH_TITLE = """\
## TransferSearch

`topwork search FILE` runs a search; see [Search](search.md). In a cluster, it is a custom resource, too. The keys of
`spec.template` are those of `spec` of a TransferJob. A parameter in `spec.space` is a path below it, such as
`transfer.optimizer.learningRate`; `topwork validate` checks that the template accepts each bound and each choice."""
# Spelling of the words of rule names that are not plain lower-case words in a title.
SPELLINGS = {
    "cmaes": "CMA-ES",
    "cnn": "CNN",
    "cut mix": "CutMix",
    "fine tune": "fine-tune",
    "gpus": "GPUs",
    "kubernetes api": "Kubernetes API",
    "mix up": "MixUp",
    "one hot": "one-hot",
}


def reference_text() -> str:
    """Generate the reference.

    Returns:
        Markdown with one table per model, in the order of the spec.
    """
    jobs = [
        "\n".join(_section(f"## `{path}`" if path else "## TransferJob", model))
        for path, model in key_types.walk_models(TransferJob)
    ]
    searches = [
        "\n".join(_section(f"### `{path}`" if path else SEARCH_TITLE, model)) for path, model in models_of_a_search()
    ]
    return "\n".join([INTRODUCTION, *jobs, *searches])


def models_of_a_search() -> Iterator[tuple[str, type[SpecModel]]]:
    """Yield the models of a TransferSearch, without those that a TransferJob has, too, each with its path."""
    shared = {model for _, model in key_types.walk_models(TransferJob)}
    return ((path, model) for path, model in key_types.walk_models(TransferSearch) if model not in shared)


def _section(title: str, model: type[SpecModel]) -> Iterator[str]:
    yield title
    yield ""
    yield (model.__doc__ or "").strip()
    yield ""
    yield "| Key | Allowed | Default | Description |"
    yield "| --- | --- | --- | --- |"
    for key, field in key_types.fields_by_key(model).items():
        allowed = key_types.describe_types(key_types.expand_types(field.annotation, field.metadata))
        cells = [f"`{key}`", allowed, _default(field), field.description or ""]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""
    rules = get_rules(model)
    if rules:
        yield "Rules between these keys:"
        yield ""
        yield from (f"- **{_rule_title(check.__name__)}**: {check.__doc__}" for check in rules)
        yield ""


def _rule_title(name: str) -> str:
    title = name.replace("_", " ")
    for words, spelling in SPELLINGS.items():
        title = re.sub(rf"\b{words}\b", spelling, title)
    return title[0].upper() + title[1:]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    if field.default is None:
        return ""
    default = field.default
    if isinstance(default, SpecModel):
        default = default.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return f"`{json.dumps(default)}`"
