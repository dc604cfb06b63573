"""The journal of a search in object storage: an object for each event, created by a conditional write."""

import json
import re
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from topwork.clients.s3.storage import Storage
from topwork.errors import DataError
from topwork.search.journal import Event, JournalConflictError

SEARCHES_PREFIX = "searches"
READERS = 8
"""Number of events that are read at the same time."""


def search_prefix(search_id: str) -> str:
    """Return the key prefix of a search, relative to the storage of its jobs."""
    return f"{SEARCHES_PREFIX}/{search_id}"


class StorageJournal:
    """Events as `searches/<search id>/journal/<number>.json`. See `Journal` for its methods."""

    def __init__(self, storage: Storage, search_id: str) -> None:
        """Create the journal; nothing is written before the first event.

        Args:
            storage: Storage of the jobs.
            search_id: Id of the search.
        """
        self._storage = storage
        self._prefix = f"{search_prefix(search_id)}/journal/"
        # Storage takes an object with the same bytes for its own if the response to a write is lost.
        self._writer = secrets.token_hex(8)

    def read(self, start: int = 0) -> list[Event]:
        """Read the events from a number on."""
        keys = [stored.key for stored in self._storage.list(self._prefix)]
        numbers = sorted(int(match[1]) for key in keys if (match := re.fullmatch(r".*/(\d{8})\.json", key)))
        if numbers != list(range(len(numbers))):
            missing = next(number for number, found in enumerate(numbers) if number != found)
            raise DataError(
                f"{self._storage.uri_of(self._key(missing))} is missing, but later events of the search exist: the "
                "journal was changed by hand. Restore the object, or start a new search by changing its seed."
            )
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self._read, numbers[start:]))

    def append(self, number: int, event: Event) -> None:
        """Append an event atomically."""
        data = json.dumps({"writer": self._writer, **event}, separators=(",", ":"), allow_nan=False).encode()
        key = self._key(number)
        if not self._storage.write(key, data, only_if_absent=True, content_type="application/json"):
            raise JournalConflictError(
                f"Another coordinator of the search has written {self._storage.uri_of(key)} first. Run the same "
                "command again once it has ended."
            )

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:08}.json"

    def _read(self, number: int) -> Event:
        key = self._key(number)
        try:
            event: Any = json.loads(self._storage.read(key) or b"")
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise DataError(
                f"{self._storage.uri_of(key)} is not an event of a search: it was changed by hand. Restore the object, "
                "or start a new search by changing its seed."
            )
        event.pop("writer", None)
        return event
