"""OpenAPI v3 of the API server used in tests, for `kubectl explain` and the validation before `kubectl apply`."""

import hashlib
from collections.abc import Iterable

from api_kinds import Kind, Object

ROOT = "/openapi/v3"
META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
OBJECT_META: Object = {
    "type": "object",
    "description": "ObjectMeta is metadata that all persisted resources must have.",
    "properties": {
        "name": {"type": "string", "description": "Name must be unique within a namespace."},
        "namespace": {"type": "string", "description": "Namespace of the object."},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}, "description": "Labels."},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}, "description": "Annotations."},
    },
}
API_VERSION = {"type": "string", "description": "Version of the schema of this object."}
KIND = {"type": "string", "description": "Kind of this object."}


def openapi_response(path: str, kinds: Iterable[Kind]) -> Object | None:
    """Return the response to a request below /openapi/v3; None for other paths."""
    kinds = [*kinds]
    versions = {(f"apis/{kind.api_version}" if kind.group else f"api/{kind.api_version}"): kind for kind in kinds}
    if path == ROOT:
        urls = {name: f"{ROOT}/{name}?hash={_digest(kinds)}" for name in sorted(versions)}
        return {"paths": {name: {"serverRelativeURL": url} for name, url in urls.items()}}
    name = path.removeprefix(f"{ROOT}/")
    if name == path or name not in versions:
        return None
    return _document(name, [kind for kind in kinds if kind.api_version == versions[name].api_version])


def _digest(kinds: list[Kind]) -> str:
    return hashlib.sha256(repr([(kind, kind.definition) for kind in kinds]).encode()).hexdigest()


def _document(prefix: str, kinds: list[Kind]) -> Object:
    paths: Object = {}
    schemas: Object = {META: OBJECT_META}
    for kind in kinds:
        schemas[_schema_name(kind)] = _schema(kind)
        scope = "/namespaces/{namespace}" if kind.namespaced else ""
        base = f"/{prefix}{scope}/{kind.plural}"
        operations = _operations(kind)
        paths[base] = {name: operations[name] for name in ("get", "post")}
        paths[f"{base}/{{name}}"] = {name: operations[name] for name in ("get", "put", "patch", "delete")}
    info = {"title": "Kubernetes", "version": "v1.36.0"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": schemas}}


def _operations(kind: Kind) -> Object:
    gvk = _group_version_kind(kind)
    parameters = [
        {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
        for name in ("dryRun", "fieldManager", "fieldValidation")
    ]
    operation = {"x-kubernetes-group-version-kind": gvk, "responses": {"200": {"description": "OK"}}}
    writes = {name: operation | {"parameters": parameters} for name in ("post", "put", "patch")}
    return {"get": operation, "delete": operation} | writes


def _group_version_kind(kind: Kind) -> Object:
    return {"group": kind.group, "version": kind.version, "kind": kind.name}


def _schema_name(kind: Kind) -> str:
    return ".".join([*reversed(kind.group.split(".")), kind.version, kind.name]).lstrip(".")


def _schema(kind: Kind) -> Object:
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema = kind.schema or {"type": "object", "properties": {"spec": free, "status": free}}
    metadata = {"description": "Standard object's metadata.", "allOf": [{"$ref": f"#/components/schemas/{META}"}]}
    implicit = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata}
    return schema | {
        "properties": schema.get("properties", {}) | implicit,
        "x-kubernetes-group-version-kind": [_group_version_kind(kind)],
    }
