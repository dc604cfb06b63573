"""JSON Schema of the job spec, as `schema/transferjob.schema.json` and `topwork schema` give it."""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from topwork.spec.dataset import DatasetSource
from topwork.spec.job import TransferJob
from topwork.spec.model import Base
from topwork.spec.section import Part

ADDRESS = "https://topwork.dev/v1alpha1/transferjob.schema.json"
# Parts of which exactly one of these keys is given. All else that crosses keys is told by `topwork validate` alone.
ONE_OF: dict[type[Part], tuple[str, ...]] = {
    DatasetSource: ("tfds", "folder", "archive", "table"),
    Base: ("application", "saved", "cnn"),
}


def schema_text() -> str:
    """Write the JSON Schema (draft 2020-12).

    Returns:
        Indented JSON that ends with a line break; the same for the same models.
    """
    schema = TransferJob.model_json_schema(by_alias=True, mode="validation")
    one_of(any_of(schema))
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "$id": ADDRESS,
        "title": "topwork TransferJob",
        "examples": [_example()],
    }
    return json.dumps(head | {key: value for key, value in schema.items() if key not in head}, indent=2) + "\n"


def any_of(schema: Any) -> Any:
    """Let a value be of several types at once, wherever it may be of one of several: 4 cores are a number, too.

    Args:
        schema: A JSON Schema as pydantic makes it; changed in place.

    Returns:
        The same.
    """
    if isinstance(schema, dict):
        if "oneOf" in schema:
            schema["anyOf"] = schema.pop("oneOf")
        for inner in schema.values():
            any_of(inner)
    elif isinstance(schema, list):
        for inner in schema:
            any_of(inner)
    return schema


def one_of(schema: dict[str, Any]) -> None:
    """Say of which parts exactly one key is given.

    Args:
        schema: A JSON Schema with the parts of the spec in its `$defs`; changed in place.
    """
    for part, keys in ONE_OF.items():
        schema["$defs"][part.__name__]["oneOf"] = [{"required": [key]} for key in keys]


def _example() -> dict[str, Any]:
    return {
        "apiVersion": "topwork.dev/v1alpha1",
        "kind": "TransferJob",
        "metadata": {"name": "cats-vs-dogs"},
        "spec": {
            "storage": "s3://ml-artifacts/topwork",
            "dataset": {
                "source": {"tfds": "cats_vs_dogs"},
                "splits": {"train": "train[:40%]", "validation": "train[40%:50%]", "test": "train[50%:60%]"},
                "imageSize": [150, 150],
            },
            "model": {"base": {"application": "Xception"}},
            "fineTune": {"epochs": 10},
        },
    }
