"""Structural OpenAPI schemas of the API server, generated from the models of the spec and the status.

A structural schema has no `$ref`, and gives each value one type. A union of types, such as a name or a mapping, has no
type: the API server stores it as it is, validates each JSON type with the keywords that apply to it, and cannot read it
in CEL rules. The API server removes null, as if the key were not set, except where it is a value: among the choices and
conditions of a parameter.
"""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from topwork.cluster.definition.kubernetes_schemas import affinity_schema, toleration_schema
from topwork.cluster.definition.validation_rules import rules_of_model, rules_of_value
from topwork.spec.applications import APPLICATIONS
from topwork.spec.job import JobSpec
from topwork.spec.model import validate_application
from topwork.spec.schema.key_types import KeyType, expand_types, fields_by_key, is_list
from topwork.spec.search.space import in_template
from topwork.spec.spec_model import SpecModel
from topwork.spec.uris import MAX_URI_LENGTH

Schema = dict[str, Any]
Path = tuple[str, ...]

UNTYPED: Schema = {"x-kubernetes-preserve-unknown-fields": True}
ITEM = "[]"
"""Step of a path that represents the index of a list."""
# kubectl and Helm parse YAML 1.1, in which these words are booleans.
SWITCHES = {"on": True, "off": False}
# The ConfigMap topwork-defaults of a namespace may set storage, compute and metrics. fineTune requires a learning rate
# for any optimizer that differs from its default.
WITHOUT_DEFAULT = {("spec", "compute"), ("spec", "metrics"), ("spec", "fineTune", "optimizer", "learningRate")}
SET_BY_NAMESPACE = {("spec", "storage")}
# Lists and maps are atomic unless they are merged item by item. A list with a default must be atomic: server-side apply
# would add the items to those of the default.
LIST_TYPES: dict[Path, Schema] = {
    ("spec", "compute", "imagePullSecrets"): {"x-kubernetes-list-type": "set"},
    ("status", "conditions"): {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
}
MAP_TYPES: dict[Path, Schema] = {("spec", "compute", "nodeSelector"): {"x-kubernetes-map-type": "atomic"}}
KUBERNETES_TYPES = {
    ("spec", "compute", "affinity"): affinity_schema,
    ("spec", "compute", "tolerations", ITEM): toleration_schema,
}
TEXTS = {"description", "message", "messageExpression"}
SCALARS = {str: "string", bool: "boolean", int: "integer", float: "number"}
LENGTHS = {"string": "Length", "array": "Items", "object": "Properties"}


def object_schema(model: type[BaseModel], path: Path, *, with_rules: bool = True) -> Schema:
    """Generate the schema of a mapping with known keys.

    Args:
        model: Its model.
        path: Path of the mapping in the object, such as `("spec", "transfer")`.
        with_rules: Whether to add the CEL rules of the model; they are not allowed below a union.

    Returns:
        A structural schema.
    """
    fields = {(*path, key): field for key, field in fields_by_key(model).items()}
    required = [key[-1] for key, field in fields.items() if field.is_required() and key not in SET_BY_NAMESPACE]
    schema: Schema = {"type": "object"} | ({"required": required} if required else {})
    schema["properties"] = {key[-1]: _field_schema(field, key, with_rules) for key, field in fields.items()}
    return schema | _validations(rules_of_model(model) if with_rules and issubclass(model, SpecModel) else [])


def _field_schema(field: FieldInfo, path: Path, with_rules: bool) -> Schema:
    allowed = tuple(expand_types(field.annotation, field.metadata))
    schema: Schema = {"description": field.description} | _default(field, path)
    if len(allowed) == 1:
        return schema | _value_schema(allowed[0], path, with_rules)
    return schema | _union_schema(allowed, path)


def _default(field: FieldInfo, path: Path) -> Schema:
    default = field.default
    if path[0] != "spec" or any(path[: len(prefix)] == prefix for prefix in WITHOUT_DEFAULT):
        return {}
    if field.is_required() or default is None:
        return {}
    if isinstance(default, BaseModel):
        # Complete: the API server checks the rules of a default before it fills in the defaults of its keys.
        return {"default": default.model_dump(mode="json", by_alias=True, exclude_none=True)}
    return {"default": list(default) if isinstance(default, tuple) else default}


def _value_schema(allowed: KeyType, path: Path, with_rules: bool) -> Schema:
    """Generate the schema of a value with one type."""
    python_type = allowed.python_type
    if path in KUBERNETES_TYPES:
        return KUBERNETES_TYPES[path]()
    if python_type is Any:
        return UNTYPED | {"nullable": True}
    if python_type is JobSpec:
        # The template of a search has the schema of a job.
        template: Schema = _name_template_keys(object_schema(JobSpec, ("spec",)))
        return template
    if isinstance(python_type, type) and issubclass(python_type, BaseModel):
        return object_schema(python_type, path, with_rules=with_rules)
    if is_list(python_type):
        return _list_schema(allowed, path, with_rules)
    if get_origin(python_type) is dict:
        values = _any_schema(get_args(python_type)[1], path, with_rules)
        return (
            {"type": "object", "additionalProperties": values} | _lengths("object", allowed) | MAP_TYPES.get(path, {})
        )
    if get_origin(python_type) is Literal:
        return _enum_schema(get_args(python_type))
    if python_type is datetime:
        return {"type": "string", "format": "date-time"}
    scalar = {"type": SCALARS[python_type]} | _bounds(allowed)
    return scalar | (_string_keywords(allowed, with_rules) if python_type is str else {})


def _name_template_keys(schema: Any) -> Any:
    """Replace the paths of keys of a job in texts by those of the template of a search."""
    if isinstance(schema, list):
        return [_name_template_keys(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: in_template(value) if key in TEXTS and isinstance(value, str) else _name_template_keys(value)
        for key, value in schema.items()
    }


def _any_schema(annotation: Any, path: Path, with_rules: bool) -> Schema:
    allowed = tuple(expand_types(annotation))
    return _value_schema(allowed[0], path, with_rules) if len(allowed) == 1 else _union_schema(allowed, path)


def _list_schema(allowed: KeyType, path: Path, with_rules: bool) -> Schema:
    arguments = get_args(allowed.python_type)
    lengths = _lengths("array", allowed)
    if Ellipsis not in arguments:
        lengths = {"minItems": len(arguments), "maxItems": len(arguments)}
    items = _any_schema(arguments[0], (*path, ITEM), with_rules)
    list_type = LIST_TYPES.get(path, {"x-kubernetes-list-type": "atomic"})
    return {"type": "array", "items": items} | lengths | list_type


def _enum_schema(values: tuple[str, ...]) -> Schema:
    if switches := [SWITCHES[value] for value in values if value in SWITCHES]:
        return UNTYPED | {"enum": [*values, *switches]}
    return {"type": "string", "enum": list(values)}


def _string_keywords(allowed: KeyType, with_rules: bool) -> Schema:
    validator = allowed.find(AfterValidator)
    if validator and validator.func is validate_application:
        return {"enum": list(APPLICATIONS)}
    pattern = next((item.pattern for item in allowed.metadata if getattr(item, "pattern", None)), None)
    keywords = _lengths("string", allowed) | ({"pattern": pattern} if pattern else {})
    rules = rules_of_value(allowed)
    return keywords | ({"maxLength": MAX_URI_LENGTH} if rules else {}) | _validations(rules if with_rules else [])


def _lengths(schema_type: str, allowed: KeyType) -> Schema:
    minimum, maximum = allowed.find(MinLen), allowed.find(MaxLen)
    lengths = {"min": minimum and minimum.min_length, "max": maximum and maximum.max_length}
    return {f"{bound}{LENGTHS[schema_type]}": length for bound, length in lengths.items() if length}


def _bounds(allowed: KeyType) -> Schema:
    minimum, above, maximum, below = (allowed.find(kind) for kind in (Ge, Gt, Le, Lt))
    schema: Schema = {}
    if minimum or above:
        schema["minimum"] = minimum.ge if minimum else above.gt
    if above:
        schema["exclusiveMinimum"] = True
    if maximum or below:
        schema["maximum"] = maximum.le if maximum else below.lt
    if below:
        schema["exclusiveMaximum"] = True
    return schema


def _union_schema(members: tuple[KeyType, ...], path: Path) -> Schema:
    """Combine the keywords of all members: each keyword applies to values of one JSON type only."""
    if {member.python_type for member in members} == {str, int}:
        schema: Schema = {"x-kubernetes-int-or-string": True}
    else:
        schema = dict(UNTYPED)
    # A fraction has wider bounds than a number of cores.
    for member in sorted(members, key=lambda member: member.python_type is float):
        keywords = _value_schema(member, path, with_rules=False)
        schema |= _without_type(keywords) | {
            "properties": schema.get("properties", {}) | keywords.get("properties", {})
        }
    models = [
        member
        for member in members
        if isinstance(member.python_type, type) and issubclass(member.python_type, BaseModel)
    ]
    if not schema["properties"]:
        del schema["properties"]
    if len(models) > 1:
        # Each of these models has one key.
        schema = {key: value for key, value in schema.items() if key != "required"} | {
            "minProperties": 1,
            "maxProperties": 1,
        }
    return schema


def _without_type(schema: Schema) -> Schema:
    """Return the keywords of a schema that are allowed without a type."""
    result = {key: value for key, value in schema.items() if key not in {"type", "x-kubernetes-list-type", "enum"}}
    if words := [re.escape(value) for value in schema.get("enum", []) if isinstance(value, str)]:
        result["pattern"] = f"^({'|'.join(words)})$"
    return result


def _validations(rules: Iterable[Schema]) -> Schema:
    validations = list(rules)
    return {"x-kubernetes-validations": validations} if validations else {}
