"""Routes changes and keys to what reconciles TransferJobs, and to what reconciles TransferSearches."""

from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.object_cache import Key, ObjectCache
from topwork.cluster.controller.reconciler import Reconciler, ReconcilerSettings
from topwork.cluster.controller.searches.search_cache import SEARCH, SearchCache, SearchKey
from topwork.cluster.controller.searches.search_reconciler import SearchReconciler

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


class Dispatcher:
    """The caches and reconcilers of both kinds. Thread-safe for different keys.

    Args:
        cluster: The cluster.
        settings: Intervals, timeouts and the clock.

    Attributes:
        cache: The watched TransferJobs, Jobs and pods.
        search_cache: The watched TransferSearches, and the TransferJobs that they own.
    """

    def __init__(self, cluster: "Cluster", settings: ReconcilerSettings) -> None:
        self.cache, self.search_cache = ObjectCache(), SearchCache()
        self._reconciler = Reconciler(cluster, self.cache, settings)
        self._search_reconciler = SearchReconciler(cluster, self.search_cache, settings.now)

    def update(self, event_type: str, obj: KubernetesObject) -> list[Key | SearchKey]:
        """Record a change.

        Args:
            event_type: ADDED, MODIFIED or DELETED.
            obj: The TransferSearch, TransferJob, Job or pod after the change.

        Returns:
            What has to be reconciled: a TransferJob, the TransferSearch that owns it, both, or nothing.
        """
        key = None if obj["kind"] == SEARCH else self.cache.update(event_type, obj)
        search_key = self.search_cache.update(event_type, obj)
        return [found for found in (key, search_key) if found]

    def reconcile(self, key: Key | SearchKey) -> float | None:
        """Bring a TransferJob or a TransferSearch up to date.

        Returns:
            Seconds after which it must be reconciled again even without a change; None to wait for a change.

        Raises:
            TopworkError: Try again with back-off.
        """
        if isinstance(key, SearchKey):
            return self._search_reconciler.reconcile(key)
        return self._reconciler.reconcile(key)
