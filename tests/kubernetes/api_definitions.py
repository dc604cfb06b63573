"""CustomResourceDefinitions of the API server used in tests."""

import copy

from api_apply import timestamp
from api_kinds import Object


def set_definition_status(definition: Object, old: Object | None) -> None:
    """Set the defaults and the status of a CustomResourceDefinition, as its controllers do."""
    spec = definition["spec"]
    names = spec["names"]
    names.setdefault("singular", names["kind"].lower())
    names.setdefault("listKind", f"{names['kind']}List")
    spec.setdefault("conversion", {"strategy": "None"})
    conditions = [
        _condition("NamesAccepted", "NoConflicts", "no conflicts found"),
        _condition("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ]
    before = (old or {}).get("status", {})
    definition["status"] = {
        "acceptedNames": copy.deepcopy(names),
        "conditions": before.get("conditions", conditions),
        "storedVersions": [version["name"] for version in spec["versions"] if version["storage"]],
    }


def _condition(kind: str, reason: str, message: str) -> Object:
    fields = {"type": kind, "status": "True", "reason": reason, "message": message}
    return fields | {"lastTransitionTime": timestamp()}
