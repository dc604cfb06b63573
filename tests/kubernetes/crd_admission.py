"""What an API server does with a custom resource that is created."""

import copy

from crd_errors import FieldError
from crd_pruning import Schema, prune, prune_nulls, root_schema, set_defaults
from crd_rules import validate_rules
from crd_validation import validate_schema

from topwork.clients.kubernetes import KubernetesObject


def admit(data: KubernetesObject, schema: Schema) -> tuple[KubernetesObject, list[str], list[FieldError]]:
    """Return the object as the API server stores it, its unknown keys, and the errors of its schema and its rules.

    Args:
        data: The object, which is not changed.
        schema: `openAPIV3Schema` of its definition.
    """
    obj, schema = copy.deepcopy(data), root_schema(schema)
    unknown = prune(obj, schema)
    prune_nulls(obj, schema)
    set_defaults(obj, schema)
    errors = [*validate_schema(obj, schema)]
    return obj, unknown, errors or [*validate_rules(obj, schema)]
