"""Progress of long operations: the interface that stages report to. The command line implements it."""

from contextlib import AbstractContextManager
from typing import Protocol

Fact = str | int | float | bool | None


class Tracker(Protocol):
    """Counts the completed items of an operation."""

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Add completed items.

        Args:
            count: Number of items that completed since the last call.
            **facts: Values to show next to the bar, such as the loss.
        """


class Progress(Protocol):
    """Shows how far long operations are."""

    def track(self, what: str, total: int | None) -> AbstractContextManager[Tracker]:
        """Show the progress of an operation while the block runs.

        Args:
            what: Name of the operation, such as `transfer`.
            total: Number of items; None if unknown.
        """
