"""Reads the status that the controller stored in a custom resource."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.objects import name_of
from topwork.errors import SettingError

S = TypeVar("S", bound=BaseModel)


def read_stored_status(obj: KubernetesObject, model: type[S], kind: str) -> S:
    """Read the status of a custom resource.

    Args:
        obj: The custom resource.
        model: Model of its status.
        kind: Its kind in lower case, for messages.

    Returns:
        Its status; that of a pending object if no controller has written one.

    Raises:
        SettingError: If a newer version of topwork wrote it with values that this one does not know.
    """
    try:
        return model.model_validate(obj.get("status") or {})
    except ValidationError as error:
        problem = error.errors()[0]
        raise SettingError(
            f"The status of {kind}/{name_of(obj)} has an unknown value at "
            f"{'.'.join(map(str, problem['loc']))}: a newer version of topwork wrote it. Use that version."
        ) from None
