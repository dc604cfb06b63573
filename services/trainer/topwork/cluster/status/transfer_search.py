"""The status of a TransferSearch, as its controller stored it."""

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.stored_status import read_stored_status
from topwork.cluster.transfer_search_status import TransferSearchStatus


def read_transfer_search_status(obj: KubernetesObject) -> TransferSearchStatus:
    """Read the status of a TransferSearch; that of a pending one if no controller has written one.

    Raises:
        SettingError: If a newer version of topwork wrote it with values that this one does not know.
    """
    return read_stored_status(obj, TransferSearchStatus, "transfersearch")
