"""The TransferSearches that the controller watches, and the TransferJobs that they own."""

import threading
from typing import NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.status.objects import get_controller, name_of

SEARCH = "TransferSearch"


class SearchKey(NamedTuple):
    """Namespace, kind and name of a TransferSearch. The kind tells its keys in a work queue from those of others."""

    namespace: str
    kind: str
    name: str


class CachedSearch(NamedTuple):
    """A TransferSearch and the TransferJobs that it owns."""

    search: KubernetesObject
    transfer_jobs: list[KubernetesObject]


class SearchCache:
    """The latest known objects; thread-safe. Objects are shared with callers, who must not change them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._searches: dict[SearchKey, KubernetesObject] = {}
        self._transfer_jobs: dict[SearchKey, dict[str, KubernetesObject]] = {}

    def update(self, event_type: str, obj: KubernetesObject) -> SearchKey | None:
        """Record a change.

        Args:
            event_type: ADDED, MODIFIED or DELETED.
            obj: The object after the change, of any kind.

        Returns:
            The TransferSearch concerned; None if the object belongs to none.
        """
        key = search_key_of(obj)
        if key is None:
            return None
        with self._lock:
            if obj["kind"] == SEARCH:
                self._update_search(key, event_type, obj)
            else:
                self._update_transfer_job(key, event_type, obj)
        return key

    def get(self, key: SearchKey) -> CachedSearch | None:
        """Return a TransferSearch with the TransferJobs that it owns; None if it does not exist."""
        with self._lock:
            search = self._searches.get(key)
            owned = list(self._transfer_jobs.get(key, {}).values())
        if search is None:
            return None
        uid = search["metadata"]["uid"]
        return CachedSearch(search, [obj for obj in owned if _owner_uid(obj) == uid])

    def searches(self) -> list[KubernetesObject]:
        """Return all TransferSearches."""
        with self._lock:
            return list(self._searches.values())

    def _update_search(self, key: SearchKey, event_type: str, obj: KubernetesObject) -> None:
        current = self._searches.get(key)
        if event_type != "DELETED":
            self._searches[key] = obj
        elif current is not None and current["metadata"]["uid"] == obj["metadata"]["uid"]:
            del self._searches[key]

    def _update_transfer_job(self, key: SearchKey, event_type: str, obj: KubernetesObject) -> None:
        owned = self._transfer_jobs.setdefault(key, {})
        if event_type == "DELETED":
            owned.pop(obj["metadata"]["uid"], None)
        else:
            owned[obj["metadata"]["uid"]] = obj
        if not owned:
            del self._transfer_jobs[key]


def search_key_of(obj: KubernetesObject) -> SearchKey | None:
    """Return the TransferSearch that an object is, or that owns it; None if it is neither."""
    namespace = str(obj["metadata"].get("namespace"))
    if obj["kind"] == SEARCH:
        return SearchKey(namespace, SEARCH, name_of(obj))
    owner = get_controller(obj) if obj["kind"] == "TransferJob" else None
    return SearchKey(namespace, SEARCH, str(owner["name"])) if owner and owner["kind"] == SEARCH else None


def _owner_uid(obj: KubernetesObject) -> str | None:
    owner = get_controller(obj)
    return str(owner["uid"]) if owner else None
