"""Searches on the command line: the file of a search, its name or ID in a storage, or its name in a cluster."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from topwork.cli.options import open_cluster
from topwork.cli.runtime.storage import open_storage
from topwork.errors import SettingError
from topwork.spec.loading.loader import read_searches
from topwork.spec.search import TransferSearch

if TYPE_CHECKING:
    from topwork.clients.kubernetes import KubernetesObject
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.clients.s3.storage import Storage
    from topwork.search.study import Study

SEARCH_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
SEARCH_URI = re.compile(r"(?P<storage>s3://.+)/searches/(?P<id>[^/]+)/?.*")


class OpenSearch(NamedTuple):
    """A search that was started.

    Attributes:
        search: The search.
        id: Its ID.
        study: Its trials.
        storage: Its storage; None for a search in a cluster.
        status: State of the TransferSearch in the cluster; empty for other searches.
        publisher: Run in the cluster that publishes the best trial; None if there is none.
    """

    search: TransferSearch
    id: str
    study: "Study"
    storage: "Storage | None"
    status: str = ""
    publisher: str | None = None


class SearchAddress(NamedTuple):
    """Which search the arguments and options of a command select.

    Attributes:
        where: Its file, its storage, the URI `s3://…/searches/<id>`, or its name in a cluster.
        name: Its name or ID, if `where` is a storage. Of several searches with a name, the one that was started last.
        overrides: `PATH=VALUE` items that apply to the file.
        state: State directory of the embedded S3 server; None for the default.
        namespace: Namespace in a cluster.
        context: Context of the kubeconfig.
        kubeconfig: Kubeconfig file.
    """

    where: str
    name: str | None = None
    overrides: Sequence[str] = ()
    state: Path | None = None
    namespace: str | None = None
    context: str | None = None
    kubeconfig: Path | None = None


def read_one_search(file: Path, overrides: Sequence[str] = ()) -> TransferSearch:
    """Read a file with exactly one search.

    Raises:
        InvalidSpecError: If the file has problems.
        SettingError: If it contains several searches.
    """
    searches = [search for _, search in read_searches([file], overrides)]
    if len(searches) > 1:
        names = ", ".join(search.metadata.name for search in searches)
        raise SettingError(
            f"{file} contains {len(searches)} searches ({names}), but a process runs exactly one. Put each search in "
            "its own file."
        )
    return searches[0]


@contextmanager
def open_search(address: SearchAddress) -> Iterator[OpenSearch]:
    """Open a search that was started, without changing it.

    Args:
        address: The search.

    Yields:
        The search.

    Raises:
        InvalidSpecError: If the file has problems.
        SettingError: If no such search was started.
    """
    if _is_in_cluster(address):
        yield _open_in_cluster(address)
    elif address.where.startswith("s3://"):
        uri, name = _parse_uri(address.where, address.name)
        with open_storage(uri, address.state) as storage:
            yield _find_search(storage, name)
    else:
        with _open_file(address) as opened:
            yield opened


@contextmanager
def _open_file(address: SearchAddress) -> Iterator[OpenSearch]:
    from topwork.registry.searches import read_search
    from topwork.search.search_id import search_id

    where = address.where
    if address.name is not None:
        raise SettingError(f"Got {where} and {address.name}. Expected FILE, STORAGE NAME, or s3://…/searches/ID.")
    search = read_one_search(Path(where), address.overrides)
    with open_storage(search.spec.template.storage, address.state) as storage:
        if read_search(storage, search_id(search)) is None:
            raise SettingError(
                f"{search_id(search)}, the search of {where}, was not started in {storage.uri}. Start it with topwork "
                "search, or use the --set options that it was started with. Of a search in a cluster, give the name."
            )
        yield _open(search, storage)


def _is_in_cluster(address: SearchAddress) -> bool:
    """Return whether an address is that of a search in a cluster: a name that is no file, or one with a kind."""
    from topwork.cluster.operations.transfer_searches import PREFIXES

    prefix, _, name = address.where.rpartition("/")
    is_name = bool(SEARCH_NAME.fullmatch(name)) and (not prefix or prefix in PREFIXES)
    if address.namespace or address.context or address.kubeconfig:
        if not is_name:
            raise SettingError(
                f"Got {address.where} with --namespace, --context or --kubeconfig, which select a search in a cluster. "
                "Expected the name of a TransferSearch, such as flowers or ts/flowers."
            )
        return True
    return is_name and (bool(prefix) or not Path(address.where).exists())


def _open_in_cluster(address: SearchAddress) -> OpenSearch:
    from topwork.cluster.operations.transfer_searches import get_search
    from topwork.cluster.status.transfer_search import read_transfer_search_status

    if address.name is not None or address.overrides:
        raise SettingError(
            f"Got {address.where}, a search in a cluster, with a second argument or --set. They apply to storages and "
            f"files. Expected a file, or only the name: {address.where}."
        )
    name = address.where.rpartition("/")[2]
    try:
        cluster = open_cluster(address.namespace, address.context, address.kubeconfig)
        obj = get_search(cluster, name)
    except SettingError as error:
        if name == address.where and not address.namespace:
            raise SettingError(f"{address.where} is neither a file nor a search in the cluster: {error}") from error
        raise
    status = read_transfer_search_status(obj)
    if status.search is None:
        reason = status.waiting_for or status.error or "the controller has not accepted it yet"
        raise SettingError(f"transfersearch/{name} in namespace {cluster.namespace} has not started: {reason}")
    state = f"{status.state}: {status.waiting_for}" if status.waiting_for else status.state
    return _read_journal(cluster, obj, status.search)._replace(status=state)


def _read_journal(cluster: "Cluster", obj: "KubernetesObject", identity: str) -> OpenSearch:
    """Read the ConfigMap in which the controller stores the spec and the journal of a search."""
    from topwork.cluster.controller.searches.config_map_journal import ConfigMapJournal
    from topwork.cluster.controller.searches.spec_resolution import config_map_name, read_target
    from topwork.cluster.operations.transfer_searches import find_publisher
    from topwork.cluster.status.objects import owner_uids
    from topwork.search.study import Study

    config_map = cluster.get("ConfigMap", config_map_name(identity))
    where = f"configmap/{config_map_name(identity)} in namespace {cluster.namespace}"
    if config_map is None or obj["metadata"]["uid"] not in owner_uids(config_map):
        problem = "does not exist" if config_map is None else "does not belong to this search"
        raise SettingError(f"{where}, the journal of {identity}, {problem}. See topwork status.")
    target = read_target(config_map, obj)
    if target is None or target.id != identity:
        raise SettingError(
            f"{where} does not contain the spec of {identity}: another version of topwork wrote it, or it was edited. "
            "Use the version of the controller."
        )
    study = Study(target.search, ConfigMapJournal(cluster, target.config_map))
    return OpenSearch(target.search, identity, study, None, publisher=find_publisher(cluster, obj))


def _parse_uri(where: str, name: str | None) -> tuple[str, str | None]:
    match = SEARCH_URI.fullmatch(where)
    return (match["storage"], match["id"]) if match and name is None else (where, name)


def _find_search(storage: "Storage", name: str | None) -> OpenSearch:
    from topwork.registry.searches import list_searches, read_search

    if name and (search := read_search(storage, name)):
        return _open(search, storage)
    ids = list_searches(storage, name) if name else []
    if not ids:
        known = ", ".join(list_searches(storage)) or "none"
        what = f"has no search {name}" if name else "is a storage. Name a search of it"
        raise SettingError(f"{storage.uri} {what}. Searches: {known}.")
    found = read_search(storage, ids[-1])
    if found is None:
        raise SettingError(f"{storage.uri_of(ids[-1])} was deleted meanwhile.")
    return _open(found, storage)


def _open(search: TransferSearch, storage: "Storage") -> OpenSearch:
    from topwork.search.search_id import search_id
    from topwork.search.storage_journal import StorageJournal
    from topwork.search.study import Study

    name = search_id(search)
    return OpenSearch(search, name, Study(search, StorageJournal(storage, name)), storage)
