"""The journal of a search: an append-only list of events, from which the state of the search is read again."""

from typing import Any, Protocol

from topwork.errors import UnavailableError

Event = dict[str, Any]
"""An event as JSON: `event` is its type."""


class JournalConflictError(UnavailableError):
    """Another coordinator has appended an event first. Read the journal again before the next decision."""


class Journal(Protocol):
    """Append-only storage of events. Events are numbered from 0; an append with a number that exists fails."""

    def read(self, start: int = 0) -> list[Event]:
        """Read the events from a number on.

        Args:
            start: Number of the first event to return.

        Returns:
            The events in order.

        Raises:
            UnavailableError: If the storage of the journal cannot be reached.
            DataError: If an event is not one of this topwork version.
        """
        ...

    def append(self, number: int, event: Event) -> None:
        """Append an event atomically.

        Args:
            number: Number of the event: the number of events that the writer knows.
            event: The event.

        Raises:
            JournalConflictError: If an event with this number exists.
            UnavailableError: If the storage of the journal cannot be reached.
        """
        ...
