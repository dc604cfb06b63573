"""Searches in storage: `searches/<search id>/` with spec, journal, dataset and report."""

import re

from pydantic import ValidationError

from topwork.clients.s3.storage import Storage
from topwork.errors import DataError
from topwork.search.search_id import search_id
from topwork.search.storage_journal import SEARCHES_PREFIX, search_prefix
from topwork.spec.search import TransferSearch

SPEC_FILE, REPORT_FILE = "search.json", "report.html"


def report_key(name: str) -> str:
    """Return the key of the report of a search by its ID."""
    return f"{search_prefix(name)}/{REPORT_FILE}"


def store_search(search: TransferSearch, storage: Storage) -> None:
    """Store the spec of a search next to its journal, so that it can be shown without its file.

    Args:
        search: The search.
        storage: Storage of the search.
    """
    content = search.model_dump_json(by_alias=True, exclude_unset=True, indent=1).encode()
    storage.write(f"{search_prefix(search_id(search))}/{SPEC_FILE}", content, content_type="application/json")


def read_search(storage: Storage, name: str) -> TransferSearch | None:
    """Read the spec with which a search was started last.

    Args:
        storage: Storage of the search.
        name: ID of the search.

    Returns:
        The search; None if there is none with this ID.

    Raises:
        DataError: If this version of topwork does not accept its spec.
    """
    key = f"{search_prefix(name)}/{SPEC_FILE}"
    data = storage.read(key)
    if data is None:
        return None
    try:
        return TransferSearch.model_validate_json(data)
    except ValidationError as error:
        raise DataError(
            f"{storage.uri_of(key)} is not a TransferSearch that this version of topwork reads: "
            f"{error.errors()[0]['msg']}. Use the version that started the search."
        ) from error


def list_searches(storage: Storage, name: str = "") -> list[str]:
    """List the IDs of the searches in storage, in the order in which they were started last.

    Args:
        storage: Storage of the searches.
        name: `metadata.name` of the searches; empty for all.
    """
    pattern = re.compile(rf"{SEARCHES_PREFIX}/({re.escape(name) if name else '.+'}-[0-9a-f]{{8}})/{SPEC_FILE}")
    found = [
        (stored.modified, match[1])
        for stored in storage.list(f"{SEARCHES_PREFIX}/{name}")
        if (match := pattern.fullmatch(stored.key))
    ]
    return [search for _, search in sorted(found)]
