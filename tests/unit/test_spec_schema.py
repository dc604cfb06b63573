"""The JSON Schema and the reference match the spec models."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from topwork.cli.commands.spec import SpecKind, schema
from topwork.spec import TransferJob
from topwork.spec.schema import key_types
from topwork.spec.schema.json_schema import schema_text
from topwork.spec.schema.reference import models_of_a_search, reference_text
from topwork.spec.search import TransferSearch

REPOSITORY = Path(__file__).parents[2]
Model = type[TransferJob] | type[TransferSearch]
MODELS: tuple[Model, ...] = (TransferJob, TransferSearch)


@pytest.mark.parametrize("kind", SpecKind)
def test_schema_command_prints_the_schema_in_the_repository(kind: SpecKind, capsys: pytest.CaptureFixture[str]) -> None:
    schema(kind)
    text = (REPOSITORY / "schema" / f"{kind.lower()}.schema.json").read_text()
    assert capsys.readouterr().out == text


def test_schema_of_jobs_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    schema()
    assert capsys.readouterr().out == schema_text(TransferJob)


def test_reference_in_the_repository_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "spec.md").read_text() == reference_text()


@pytest.mark.parametrize("model", MODELS)
def test_schema_has_dialect_and_id(model: Model) -> None:
    document = json.loads(schema_text(model))
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["$id"] == f"https://topwork.dev/v1alpha1/{model.__name__.lower()}.schema.json"


@pytest.mark.parametrize("model", MODELS)
def test_schema_rejects_unknown_keys_and_describes_known_ones(model: Model) -> None:
    document = json.loads(schema_text(model))
    for mapping in [document, *document["$defs"].values()]:
        assert mapping["additionalProperties"] is False
        for value in mapping["properties"].values():
            referenced = document["$defs"].get(value.get("$ref", "").removeprefix("#/$defs/"), {})
            assert value.get("description") or referenced.get("description")


def test_schema_requires_exactly_one_source_and_base_and_kind_of_values() -> None:
    models = json.loads(schema_text(TransferSearch))["$defs"]
    assert models["DatasetSource"]["oneOf"] == [{"required": [key]} for key in ("tfds", "folder", "archive", "table")]
    assert models["Base"]["oneOf"] == [{"required": [key]} for key in ("application", "saved", "cnn")]
    assert models["Parameter"]["oneOf"] == [{"required": [key]} for key in ("uniform", "logUniform", "int", "choice")]


@pytest.mark.parametrize("model", MODELS)
def test_example_in_the_schema_is_valid(model: Model) -> None:
    (example,) = json.loads(schema_text(model))["examples"]
    assert model.model_validate(example).metadata.name == "cats-vs-dogs"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").rglob("*.yaml")), ids=lambda path: path.stem)
def test_schema_accepts_every_example(path: Path) -> None:
    model = TransferSearch if path.parent.name == "searches" else TransferJob
    checker = jsonschema.Draft202012Validator(json.loads(schema_text(model)))
    for document in YAML(typ="safe").load_all(path):
        assert [error.message for error in checker.iter_errors(document)] == []


def test_reference_contains_every_key() -> None:
    jobs, searches = reference_text().split("\n## TransferSearch\n")
    sections = jobs.split("\n## ")
    missing = [
        f"{path}.{key}"
        for path, model in key_types.walk_models(TransferJob)
        for key in key_types.fields_by_key(model)
        if not any(f"| `{key}` |" in section for section in sections if section.startswith(path and f"`{path}`\n"))
    ]
    missing += [
        f"{path}.{key}"
        for path, model in models_of_a_search()
        for key in key_types.fields_by_key(model)
        if f"| `{key}` |" not in searches
    ]
    assert missing == []
