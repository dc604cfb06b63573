"""Schemas of custom resources: what the tests' API server rejects, prunes and sets, with the texts of a real one."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sample_crd
from api_custom_resources import decode, validate
from api_kinds import Key, kind_of_definition
from api_server import ApiServer
from api_statuses import ApiError
from crd_definition import definition_problems
from crd_errors import go_float
from crd_structural import structural_problems

from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.errors import SettingError

Object = dict[str, Any]
STRING, INTEGER = {"type": "string"}, {"type": "integer"}


def spec_of(**properties: Object) -> Object:
    return {"type": "object", "properties": properties}


def transfer_job(**spec: Any) -> Object:
    metadata = {"name": "cats"}
    return {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": metadata, "spec": spec}


def problems_of(schema: Object, spec: Object, old: Object | None = None) -> list[str]:
    """Return the errors of the API server for a spec."""
    kind = kind_of_definition(sample_crd.definition(schema))
    before = decode(kind, transfer_job(**old)).object if old is not None else None
    try:
        validate(kind, Key("TransferJob", "team-a", "cats"), decode(kind, transfer_job(**spec)).object, before)
    except ApiError as error:
        return [f"{cause['field']}: {cause['message']}" for cause in error.status["details"]["causes"]]
    return []


# ── Definitions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({}, ".properties[spec].type: Required value"),
        ({"type": "array"}, ".properties[spec].items: Required value"),
        (spec_of(a=STRING) | {"additionalProperties": STRING}, ".properties[spec].additionalProperties: Forbidden"),
        (spec_of(a={"const": 1} | INTEGER), ".properties[a].const: unknown field"),
        (spec_of(a={"$ref": "#/a"} | INTEGER), ".properties[a].$ref: Forbidden"),
        (spec_of(a=STRING | {"pattern": "(?=a)"}), ".pattern: must be a valid regular expression"),
        (spec_of(a=INTEGER | {"default": "b"}), '.default: Invalid value: "string"'),
        (spec_of(a=spec_of(b=STRING) | {"default": {"c": 1}}), ".default: must not have unknown fields: c"),
        (spec_of() | {"oneOf": [{"properties": {"a": {"minimum": 1}}}]}, ".oneOf[0].properties[a]: Required value"),
        (spec_of(a=STRING) | {"anyOf": [{"properties": {"a": STRING}}]}, ".anyOf[0].properties[a].type: Forbidden"),
        (spec_of(a={"type": "array", "items": spec_of(), "x-kubernetes-list-type": "set"}), "items of a set must be"),
        (
            spec_of(
                a={"type": "array", "items": spec_of(k=STRING)}
                | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"]}
            ),
            "k must be required or have a default",
        ),
        (
            spec_of(a={"x-kubernetes-int-or-string": True, "x-kubernetes-preserve-unknown-fields": True}),
            "must be false if x-kubernetes-int-or-string is true",
        ),
        (spec_of(a=INTEGER) | {"x-kubernetes-validations": [{"rule": "self.b > 1"}]}, "undefined field 'b'"),
        (spec_of(a=INTEGER) | {"x-kubernetes-validations": [{"rule": "self.a"}]}, "must evaluate to a bool"),
        (
            spec_of(a=INTEGER) | {"x-kubernetes-validations": [{"rule": "true", "messageExpression": "self.a"}]},
            "messageExpression: compilation failed: must evaluate to a string",
        ),
        (
            spec_of(a=INTEGER) | {"x-kubernetes-validations": [{"rule": "true", "fieldPath": ".b"}]},
            "fieldPath: does not refer to a valid field",
        ),
        (
            {"x-kubernetes-preserve-unknown-fields": True, "x-kubernetes-validations": [{"rule": "true"}]},
            "rules need a type",
        ),
    ],
)
def test_schema_that_is_not_structural_is_rejected(spec: Object, problem: str):
    schema = sample_crd.definition(spec)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    (found,) = structural_problems(schema)
    assert problem in found


def test_structural_schema_has_no_problems():
    rule = {"rule": "!has(self.b) || self.a < int(self.b[0].rate)", "messageExpression": "'a is ' + string(self.a)"}
    items = spec_of(name=STRING, rate={"type": "number"}) | {"required": ["name"]}
    schema = spec_of(
        a=INTEGER | {"minimum": 0, "default": 1},
        b={"type": "array", "items": items, "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        c={"x-kubernetes-int-or-string": True},
        d={"type": "object", "additionalProperties": STRING},
    ) | {"oneOf": [{"required": ["c"]}, {"required": ["d"]}], "x-kubernetes-validations": [rule]}
    assert definition_problems(sample_crd.definition(schema)) == []


def test_names_columns_and_selectable_fields_are_checked():
    definition = sample_crd.definition(
        additionalPrinterColumns=[
            {"name": "A", "type": "text", "jsonPath": ".spec.a"},
            {"name": "B"} | {"type": "date", "jsonPath": "spec"},
        ],
        selectableFields=[{"jsonPath": ".spec"}],
    )
    definition["metadata"]["name"] = "jobs"
    assert definition_problems(definition) == [
        'metadata.name: must be spec.names.plural+"."+spec.group',
        "spec.versions[0].additionalPrinterColumns[0].type: Unsupported value: 'text'",
        "spec.versions[0].additionalPrinterColumns[1].jsonPath: must be a simple JSON path",
        "spec.versions[0].selectableFields[0].jsonPath: must be a string, integer or boolean field",
    ]


# ── Decoding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_set_and_null_and_unknown_fields_are_removed():
    nested = spec_of(c=INTEGER | {"default": 3}, n=INTEGER | {"nullable": True})
    schema = spec_of(
        a=INTEGER | {"default": 1},
        b=nested,
        absent=nested,
        l={"type": "array", "items": nested},
        f=nested | {"default": {}},
    )
    kind = kind_of_definition(sample_crd.definition(schema))
    decoded = decode(kind, transfer_job(a=None, b={"n": None, "x": 1}, l=[{}]), "Warn")
    assert decoded.object["spec"] == {"a": 1, "b": {"n": None, "c": 3}, "l": [{"c": 3}], "f": {"c": 3}}
    assert decoded.warnings == ('unknown field "spec.b.x"',)


def test_free_objects_keep_unknown_fields():
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {"known": spec_of(a=STRING)}}
    kind = kind_of_definition(sample_crd.definition(free))
    assert decode(kind, transfer_job(x={"y": 1}, known={"a": "b", "z": 1})).object["spec"] == {
        "x": {"y": 1},
        "known": {"a": "b"},
    }


# ── Values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        (INTEGER | {"minimum": 1}, 0, "Invalid value: 0: spec.a in body should be greater than or equal to 1"),
        (
            {"type": "number", "minimum": 0, "exclusiveMinimum": True},
            0.0,
            "Invalid value: 0: spec.a in body should be greater than 0",
        ),
        (
            {"type": "number", "maximum": 0.5},
            0.75,
            "Invalid value: 0.75: spec.a in body should be less than or equal to 0.5",
        ),
        (INTEGER, "5", 'Invalid value: "string": spec.a in body must be of type integer: "string"'),
        (INTEGER, 1.5, 'Invalid value: "number": spec.a in body must be of type integer: "number"'),
        (STRING, True, 'Invalid value: "boolean": spec.a in body must be of type string: "boolean"'),
        (STRING | {"enum": ["b", "c"]}, "d", 'Unsupported value: "d": supported values: "b", "c"'),
        (STRING | {"pattern": "^[a-z]+$"}, "A", "Invalid value: \"A\": spec.a in body should match '^[a-z]+$'"),
        (STRING | {"pattern": "^a$"}, "a\n", "Invalid value: \"a\\n\": spec.a in body should match '^a$'"),
        (STRING | {"maxLength": 2}, "abc", "Too long: may not be more than 2 bytes"),
        (STRING | {"minLength": 1}, "", 'Invalid value: "": spec.a in body should be at least 1 chars long'),
        (
            STRING | {"format": "date-time"},
            "noon",
            'Invalid value: "noon": spec.a in body must be of type date-time: "noon"',
        ),
        (
            {"type": "array", "items": STRING, "minItems": 1},
            [],
            "Invalid value: 0: spec.a in body should have at least 1 items",
        ),
        ({"type": "array", "items": STRING, "maxItems": 1}, ["b", "c"], "Too many: 2: must have at most 1 item"),
        ({"type": "array", "items": STRING, "x-kubernetes-list-type": "set"}, ["b", "b"], 'Duplicate value: "b"'),
        (
            {"x-kubernetes-int-or-string": True},
            True,
            'Invalid value: "boolean": spec.a in body must be of type integer',
        ),
        (spec_of(b=STRING) | {"required": ["b"]}, {}, "Required value"),
    ],
)
def test_invalid_value_is_rejected(schema: Object, value: Any, problem: str):
    first = problems_of(spec_of(a=schema), {"a": value})[0]
    assert problem in first


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (INTEGER, 2.0),
        ({"type": "number"}, 1),
        (STRING | {"pattern": "a"}, "bab"),
        (STRING | {"format": "date-time"}, "2026-01-01T00:00:00Z"),
        ({"x-kubernetes-int-or-string": True}, "50%"),
    ],
)
def test_valid_value_is_accepted(schema: Object, value: Any):
    assert problems_of(spec_of(a=schema), {"a": value}) == []


def test_exactly_one_member_of_a_union_must_match():
    schema = spec_of(a=STRING, b=STRING) | {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}
    text = '<nil>: Invalid value: "": "spec" must validate one and only one schema (oneOf). Found'
    assert problems_of(schema, {}) == [f"{text} none valid"]
    assert problems_of(schema, {"a": "", "b": ""}) == [f"{text} 2 valid alternatives"]
    assert problems_of(schema, {"a": ""}) == []


def test_invalid_value_that_an_update_keeps_is_tolerated():
    schema = spec_of(a=INTEGER | {"minimum": 5}, b=STRING) | {"x-kubernetes-validations": [{"rule": "self.a > 9"}]}
    assert problems_of(schema, {"a": 1, "b": "x"}, old={"a": 1, "b": "x"}) == []
    assert problems_of(schema, {"a": 1, "b": "y"}, old={"a": 1, "b": "x"}) == [
        "spec: Invalid value: failed rule: self.a > 9"
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.5, "0.5"), (3.0, "3"), (1e6, "1e+06"), (1.5e-7, "1.5e-07"), (0.0001, "0.0001"), (-2.25, "-2.25")],
)
def test_numbers_are_formatted_as_in_go(number: float, text: str):
    assert go_float(number) == text


# ── Rules ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rule(text: str, **fields: Any) -> Object:
    return {"x-kubernetes-validations": [{"rule": text} | fields]}


@pytest.mark.parametrize(
    ("schema", "spec", "problems"),
    [
        (
            spec_of(a=INTEGER, b=INTEGER) | rule("self.a <= self.b", message="a is above b", fieldPath=".a"),
            {"a": 2, "b": 1},
            ["spec.a: Invalid value: a is above b"],
        ),
        (
            spec_of(a=INTEGER | rule("self % 2 == 0", messageExpression="string(self) + ' is odd'")),
            {"a": 3},
            ["spec.a: Invalid value: 3: 3 is odd"],
        ),
        (
            spec_of(a=INTEGER) | rule("has(self.a)", message="a is required", reason="FieldValueRequired"),
            {},
            ["spec: Required value: a is required"],
        ),
        (
            spec_of(a={"type": "number"}) | rule("self.a * 2.0 > 5.0"),
            {"a": 1},
            ["spec: Invalid value: failed rule: self.a * 2.0 > 5.0"],
        ),
        (
            spec_of(a={"type": "object", "additionalProperties": STRING | rule("self != ''")}),
            {"a": {"k": ""}},
            ["spec.a[k]: Invalid value: \"\": failed rule: self != ''"],
        ),
        (spec_of(a=STRING) | rule("quantity(self.a).isLessThan(quantity('1Gi'))"), {"a": "512Mi"}, []),
        (spec_of(a=STRING) | rule("isQuantity(self.a)", message="no"), {"a": "1GB"}, ["spec: Invalid value: no"]),
        (spec_of(namespace=STRING) | rule("self.__namespace__ == 'a'"), {"namespace": "a"}, []),
        (spec_of(a=STRING, b=INTEGER) | rule("self.?b.orValue(1) == 1"), {"a": "x"}, []),
    ],
)
def test_rules_are_evaluated(schema: Object, spec: Object, problems: list[str]):
    assert definition_problems(sample_crd.definition(schema)) == []
    assert problems_of(schema, spec) == problems


def test_rules_compare_with_the_previous_value():
    schema = spec_of(a=STRING | rule("self == oldSelf", message="is immutable"))
    assert problems_of(schema, {"a": "x"}) == []
    assert problems_of(schema, {"a": "y"}, old={"a": "x"}) == ['spec.a: Invalid value: "y": is immutable']
    first = spec_of(a=STRING | rule("oldSelf.hasValue() || self == 'x'", message="starts with x", optionalOldSelf=True))
    assert problems_of(first, {"a": "y"}) == ['spec.a: Invalid value: "y": starts with x']
    assert problems_of(first, {"a": "y"}, old={"a": "x"}) == []


def test_rules_are_not_evaluated_for_an_object_of_another_shape():
    schema = spec_of(a=INTEGER, b=STRING) | rule("self.a > 1") | {"required": ["a"]}
    problems = problems_of(schema, {"b": "x"})
    assert problems[0] == "spec.a: Required value"
    assert problems[1].startswith('<nil>: Invalid value: "null": some validation rules were not checked')


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    schema = spec_of(a=INTEGER | {"minimum": 1, "default": 7}, b=STRING) | {"required": ["b"]}
    with ApiServer(crds=[sample_crd.definition(schema)]) as server:
        yield server


def test_apply_sets_defaults_that_no_manager_owns(api_server: ApiServer, cluster: Cluster):
    stored = cluster.apply(transfer_job(b="x"))
    assert stored["spec"] == {"a": 7, "b": "x"}
    assert stored["metadata"]["managedFields"][0]["fieldsV1"] == {"f:spec": {"f:b": {}}}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda c: c.apply(transfer_job(a=0, b="x")), "a: spec.a: Invalid value: 0: spec.a in body should be greater"),
        (
            lambda c: c.apply(transfer_job(b="x", c=1)),
            "failed to create typed patch object (team-a/cats; topwork.dev/v1alpha1, Kind=TransferJob): "
            ".spec.c: field not declared in schema",
        ),
        (lambda c: c.apply(transfer_job(a="1", b="x")), ".spec.a: expected numeric (int or float), got string"),
    ],
)
def test_invalid_objects_are_rejected(
    api_server: ApiServer, cluster: Cluster, write: Callable[[Cluster], Any], message: str
):
    with pytest.raises(SettingError) as caught:
        write(cluster)
    assert message.removeprefix("a: ") in str(caught.value)
    assert api_server.list("TransferJob") == []


def test_updated_definition_keeps_the_objects(api_server: ApiServer, cluster: Cluster):
    cluster.apply(transfer_job(b="x"))
    changed = sample_crd.definition(spec_of(a=INTEGER, b=STRING, c=STRING))
    applied = cluster.apply(changed, force=True)
    assert {item["type"]: item["status"] for item in applied["status"]["conditions"]} == {
        "NamesAccepted": "True",
        "Established": "True",
    }
    assert cluster.apply(transfer_job(b="x", c="y"))["spec"] == {"a": 7, "b": "x", "c": "y"}
    with pytest.raises(SettingError, match=r"Required value: must not be empty for"):
        cluster.apply(sample_crd.definition({"description": "anything"}), force=True)
