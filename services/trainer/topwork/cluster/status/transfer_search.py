"""The status of a TransferSearch, as its controller stored it."""

from pydantic import ValidationError

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.objects import name_of
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.errors import SettingError


def read_transfer_search_status(obj: KubernetesObject) -> TransferSearchStatus:
    """Read the status of a TransferSearch; that of a pending one if no controller has written one.

    Raises:
        SettingError: If a newer version of topwork wrote it with values that this one does not know.
    """
    try:
        return TransferSearchStatus.model_validate(obj.get("status") or {})
    except ValidationError as error:
        problem = error.errors()[0]
        raise SettingError(
            f"The status of transfersearch/{name_of(obj)} has an unknown value at "
            f"{'.'.join(map(str, problem['loc']))}: a newer version of topwork wrote it. Use that version."
        ) from None
