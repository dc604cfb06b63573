"""The watch of TransferSearches, in clusters with and without their definition."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sample_searches
from api_server import ApiServer
from controller_process import until

from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.controller.runtime import watches
from topwork.cluster.controller.runtime.watches import SearchWatch
from topwork.cluster.definition import TRANSFER_SEARCH, definition

Object = dict[str, Any]


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "ROUND_SECONDS", 0.2)


@contextmanager
def running(cluster: Cluster, handle: Callable[[str, Object], object]) -> Iterator[SearchWatch]:
    watch = SearchWatch(cluster, "team-a", handle)
    watch.start()
    yield watch
    watch.stop()
    watch._thread.join(15)


def test_every_search_is_reported_whatever_its_labels(api_server: ApiServer, cluster: Cluster) -> None:
    api_server.install_crd(definition(TRANSFER_SEARCH))
    seen: list[tuple[str, str]] = []
    cluster.apply(sample_searches.search())
    with running(cluster, lambda event, obj: seen.append((event, obj["metadata"]["name"]))) as watch:
        until(lambda: watch.is_synced, "synced watch")
        assert seen == [("ADDED", "flowers")]
        cluster.delete("TransferSearch", "flowers")
        until(lambda: ("DELETED", "flowers") in seen, "deletion")


def test_a_cluster_without_the_definition_is_no_error_and_may_get_it_later(
    api_server: ApiServer, cluster: Cluster
) -> None:
    seen: list[str] = []
    with running(cluster, lambda _, obj: seen.append(obj["metadata"]["name"])) as watch:
        until(lambda: watch.is_synced, "synced watch")
        assert (watch.error, watch.problem()) == ("", None)
        api_server.install_crd(definition(TRANSFER_SEARCH))
        cluster.apply(sample_searches.search())
        until(lambda: seen, "search")
    assert seen[0] == "flowers"
