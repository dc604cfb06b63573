"""The JSON Schema and the reference match the spec models."""

import json
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from topwork.cli.commands.spec import schema
from topwork.spec import TransferJob
from topwork.spec.schema import key_types
from topwork.spec.schema.json_schema import schema_text
from topwork.spec.schema.reference import reference_text

REPOSITORY = Path(__file__).parents[2]


def test_schema_command_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    schema()
    assert capsys.readouterr().out == schema_text()


def test_schema_in_the_repository_is_up_to_date() -> None:
    assert (REPOSITORY / "schema" / "transferjob.schema.json").read_text() == schema_text()


def test_reference_in_the_repository_is_up_to_date() -> None:
    assert (REPOSITORY / "docs" / "spec.md").read_text() == reference_text()


def test_schema_has_dialect_and_id() -> None:
    document = json.loads(schema_text())
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["$id"] == "https://topwork.dev/v1alpha1/transferjob.schema.json"


def test_schema_rejects_unknown_keys_and_describes_known_ones() -> None:
    document = json.loads(schema_text())
    for model in [document, *document["$defs"].values()]:
        assert model["additionalProperties"] is False
        for value in model["properties"].values():
            referenced = document["$defs"].get(value.get("$ref", "").removeprefix("#/$defs/"), {})
            assert value.get("description") or referenced.get("description")


def test_schema_requires_exactly_one_source_and_base() -> None:
    models = json.loads(schema_text())["$defs"]
    assert models["DatasetSource"]["oneOf"] == [{"required": [key]} for key in ("tfds", "folder", "archive", "table")]
    assert models["Base"]["oneOf"] == [{"required": [key]} for key in ("application", "saved", "cnn")]


def test_example_in_the_schema_is_valid() -> None:
    (example,) = json.loads(schema_text())["examples"]
    assert TransferJob.model_validate(example).metadata.name == "cats-vs-dogs"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_schema_accepts_every_example(path: Path) -> None:
    checker = jsonschema.Draft202012Validator(json.loads(schema_text()))
    for document in YAML(typ="safe").load_all(path):
        assert [error.message for error in checker.iter_errors(document)] == []


def test_reference_contains_every_key() -> None:
    sections = reference_text().split("\n## ")
    missing = [
        f"{path}.{key}"
        for path, model in key_types.walk_models(TransferJob)
        for key in key_types.fields_by_key(model)
        if not any(f"| `{key}` |" in section for section in sections if section.startswith(path and f"`{path}`\n"))
    ]
    assert missing == []
