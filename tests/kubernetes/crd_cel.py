"""CEL as the API server evaluates it: values with the types of the schema, and the functions of Kubernetes."""

import functools
import re
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import urlsplit

from cel_expr_python import cel
from cel_expr_python.ext import ext_bindings, ext_optional, ext_strings
from crd_pruning import Schema, child_schema
from google.protobuf import descriptor_pb2, descriptor_pool, struct_pb2

TYPE = cel.Type
QUANTITY = re.compile(r"([+-]?[0-9.]+)([eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i|)")
FACTORS = {"": Decimal(1), "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "k": Decimal(1000)}
FACTORS |= {unit: Decimal(1000) ** (power + 2) for power, unit in enumerate("MGTPE")}
FACTORS |= {f"{unit}i": Decimal(1024) ** (power + 1) for power, unit in enumerate("KMGTPE")}
ROOT_METADATA = {"type": "object", "properties": {"name": {"type": "string"}, "generateName": {"type": "string"}}}
KEYWORDS = {"true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if"}
KEYWORDS |= {"import", "let", "loop", "package", "namespace", "return", "var", "void", "while"}


class CelError(Exception):
    """An expression cannot be compiled or evaluated."""


def evaluate(expression: str, values: dict[str, Any]) -> Any:
    """Evaluate an expression with `self` and `oldSelf`.

    Raises:
        CelError: If the evaluation fails, such as for a missing key.
    """
    result = _compiled(expression).eval(data=values)
    if result.type() == TYPE.ERROR:
        raise CelError(result.plain_value())
    return result.plain_value()


def compile_problem(expression: str, schema: Schema, result: str, *, is_root: bool = False) -> str | None:
    """Type-check an expression with the types of a schema; `result` is the type that it must have."""
    env = _typed_environment(_Types(schema, is_root=is_root))
    try:
        actual = env.compile(expression).return_type().name()
    except RuntimeError as error:
        return str(error).removeprefix("INVALID_ARGUMENT: ").removesuffix(" [INVALID_ARGUMENT]")
    return None if actual.lower() in {result, "dyn"} else f"must evaluate to a {result}, but has the type {actual}"


def cel_value(value: Any, schema: Schema, *, is_root: bool = False) -> Any:
    """Convert a value to the types of its schema. Fields without a type are not accessible."""
    if is_root:
        schema = schema | {"properties": schema.get("properties", {}) | {"metadata": ROOT_METADATA}}
    if isinstance(value, list):
        return [cel_value(item, schema.get("items", {})) for item in value]
    if isinstance(value, dict):
        is_map = "additionalProperties" in schema
        fields = {name: child_schema(schema, name) for name in value}
        return {
            name if is_map else escape(name): cel_value(value[name], child)
            for name, child in fields.items()
            if child is not None and is_accessible(child)
        }
    is_double = schema.get("type") == "number" and isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_double else value


def is_accessible(schema: Schema) -> bool:
    """Return whether expressions can read a field; a list or map of values without a type is not accessible either."""
    values = schema.get("items") if schema.get("type") == "array" else schema.get("additionalProperties")
    if isinstance(values, dict):
        return is_accessible(values)
    return "type" in schema or bool(schema.get("x-kubernetes-int-or-string"))


def escape(name: str) -> str:
    """Return the name of a property in expressions."""
    if name in KEYWORDS:
        return f"__{name}__"
    for text, escaped in (("__", "__underscores__"), (".", "__dot__"), ("-", "__dash__"), ("/", "__slash__")):
        name = name.replace(text, escaped)
    return name


class _Types:
    """Message types that stand for the objects of a schema."""

    def __init__(self, schema: Schema, *, is_root: bool) -> None:
        self._file = descriptor_pb2.FileDescriptorProto(name="schema.proto", package="schema", syntax="proto3")
        self._file.dependency.append("google/protobuf/struct.proto")
        if is_root:
            schema = schema | {"properties": schema.get("properties", {}) | {"metadata": ROOT_METADATA}}
        self.self_type = TYPE(self._type_of(schema))
        self.pool = descriptor_pool.DescriptorPool()
        self.pool.AddSerializedFile(struct_pb2.DESCRIPTOR.serialized_pb)
        self.pool.Add(self._file)

    def _type_of(self, schema: Schema) -> str:
        """Return the signature of the type of a schema."""
        if schema.get("type") == "array":
            return f"list<{self._type_of(schema.get('items', {}))}>"
        if schema.get("type") == "object":
            additional = schema.get("additionalProperties")
            return (
                f"map<string, {self._type_of(additional)}>" if isinstance(additional, dict) else self._message(schema)
            )
        names = {"string": "string", "integer": "int", "number": "double", "boolean": "bool"}
        return names.get(schema.get("type", ""), "dyn")

    def _message(self, schema: Schema) -> str:
        message = self._file.message_type.add(name=f"M{len(self._file.message_type)}")
        name = message.name
        for number, (key, child) in enumerate(schema.get("properties", {}).items(), start=1):
            if is_accessible(child):
                self._add_field(message, escape(key), number, child)
        return f"schema.{name}"

    def _add_field(self, message: Any, name: str, number: int, schema: Schema) -> None:
        is_list = schema.get("type") == "array" and schema.get("items", {}).get("type") != "array"
        value = schema.get("items", {}) if is_list else schema
        kinds = {"string": 9, "integer": 3, "number": 1, "boolean": 8}
        field = message.field.add(name=name, number=number, label=3 if is_list else 1)
        if value.get("type") in kinds:
            field.type = kinds[value["type"]]
            return
        field.type = 11
        additional = value.get("additionalProperties")
        if isinstance(additional, dict) and not is_list:
            self._add_map(message, field, additional)
        elif value.get("type") == "object" and not isinstance(additional, dict):
            field.type_name = f".{self._message(value)}"
        else:
            field.type_name = ".google.protobuf.Value"

    def _add_map(self, message: Any, field: Any, schema: Schema) -> None:
        entry = message.nested_type.add(name=field.name[0].upper() + field.name[1:] + "Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=1, type=9)
        self._add_field(entry, "value", 2, schema)
        field.label, field.type_name = 3, f".schema.{message.name}.{entry.name}"


def _typed_environment(types: _Types) -> cel.Env:
    variables = {"self": types.self_type, "oldSelf": types.self_type}
    return cel.NewEnv(types.pool, variables=variables, extensions=_extensions())


@functools.cache
def _environment() -> cel.Env:
    variables = {"self": TYPE.DYN, "oldSelf": TYPE.DYN, "oldSelfValue": TYPE.DYN}
    return cel.NewEnv(variables=variables, extensions=_extensions())


@functools.cache
def _compiled(expression: str) -> cel.Expression:
    try:
        return _environment().compile(expression)
    except RuntimeError as error:
        raise CelError(str(error)) from None


# ── Functions of Kubernetes ───────────────────────────────────────────────────────────────────────────────────────────


def _amount(text: Any) -> Decimal:
    match = QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"quantities must match the regular expression {QUANTITY.pattern}")
    number, unit = match.groups()
    try:
        return Decimal(number + unit) if unit[:1] in {"e", "E"} and unit[1:] else Decimal(number) * FACTORS[unit]
    except InvalidOperation:
        raise ValueError(f"{text} is not a quantity") from None


def _is_quantity(text: str) -> bool:
    try:
        _amount(text)
    except ValueError:
        return False
    return True


def _checked(text: str) -> str:
    _amount(text)
    return text


def _sign(number: Decimal) -> int:
    return (number > 0) - (number < 0)


def _find_all(text: str, pattern: str) -> list[str]:
    return [match[0] for match in re.finditer(pattern, text)]


def _is_url(text: str) -> bool:
    parts = urlsplit(text)
    return bool(parts.scheme) or text.startswith("/")


def _index(items: list[Any], value: Any) -> int:
    return items.index(value) if value in items else -1


def _function(name: str, result: cel.Type, parameters: list[cel.Type], impl: Any, *, is_member: bool) -> Any:
    return cel.FunctionDecl(name, [cel.Overload(f"k8s_{name}", result, parameters, is_member, impl)])


def _extensions() -> list[Any]:
    text, dyn, truth, integer, items = TYPE.STRING, TYPE.DYN, TYPE.BOOL, TYPE.INT, TYPE.LIST

    def member(name: str, result: cel.Type, parameters: list[cel.Type], impl: Any) -> Any:
        return _function(name, result, parameters, impl, is_member=True)

    functions = [
        _function("quantity", dyn, [text], _checked, is_member=False),
        _function("isQuantity", truth, [text], _is_quantity, is_member=False),
        _function("url", dyn, [text], lambda url: url, is_member=False),
        _function("isURL", truth, [text], _is_url, is_member=False),
        member("isGreaterThan", truth, [dyn, dyn], lambda one, other: _amount(one) > _amount(other)),
        member("isLessThan", truth, [dyn, dyn], lambda one, other: _amount(one) < _amount(other)),
        member("compareTo", integer, [dyn, dyn], lambda one, other: _sign(_amount(one) - _amount(other))),
        member("sign", integer, [dyn], lambda one: _sign(_amount(one))),
        member("isInteger", truth, [dyn], lambda one: _amount(one) == int(_amount(one))),
        member("asInteger", integer, [dyn], lambda one: int(_amount(one))),
        member("asApproximateFloat", TYPE.DOUBLE, [dyn], lambda one: float(_amount(one))),
        member("getScheme", text, [dyn], lambda url: urlsplit(url).scheme),
        member("getHost", text, [dyn], lambda url: urlsplit(url).netloc),
        member("getHostname", text, [dyn], lambda url: urlsplit(url).hostname or ""),
        member("getEscapedPath", text, [dyn], lambda url: urlsplit(url).path),
        member("isSorted", truth, [items], lambda values: values == sorted(values)),
        member("sum", dyn, [items], sum),
        member("min", dyn, [items], min),
        member("max", dyn, [items], max),
        member("find", text, [text, text], lambda value, pattern: (_find_all(value, pattern) or [""])[0]),
        member("findAll", items, [text, text], _find_all),
    ]
    kubernetes = cel.CelExtension("kubernetes", functions)
    return [ext_strings.ExtStrings(), ext_optional.ExtOptional(), ext_bindings.ExtBindings(), kubernetes]
