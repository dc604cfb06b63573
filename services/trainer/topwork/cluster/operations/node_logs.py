"""The logs of several nodes of a run: one after the other, or merged as they are written."""

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from topwork.cluster.operations.logs import LogEntry, RunLog


class NodeEntry(NamedTuple):
    """An entry of the log of a node."""

    node: int
    entry: LogEntry


class _End(NamedTuple):
    """The end of the log of a node, with the error that ended it."""

    error: Exception | None = None


class NodeLogs:
    """The logs of several nodes.

    Args:
        logs: The logs of the nodes, in the order of their indexes.
    """

    def __init__(self, logs: Sequence[RunLog]) -> None:
        self._logs = logs

    def read(self) -> Iterator[NodeEntry]:
        """Read what has been written so far, node by node."""
        for node, log in enumerate(self._logs):
            yield from (NodeEntry(node, entry) for entry in log.read())

    def follow(self) -> Iterator[NodeEntry]:
        """Follow all logs at the same time, until all of them have ended; see `RunLog.follow`.

        Raises:
            UnavailableError: If the API server or a machine does not respond for too long.
        """
        entries: SimpleQueue[NodeEntry | _End] = SimpleQueue()
        # Daemon threads: an unresponsive machine must not keep the process alive.
        for node, log in enumerate(self._logs):
            threading.Thread(target=_follow, args=(node, log, entries), daemon=True).start()
        remaining = len(self._logs)
        while remaining:
            entry = entries.get()
            if isinstance(entry, NodeEntry):
                yield entry
                continue
            if entry.error:
                raise entry.error
            remaining -= 1


def _follow(node: int, log: RunLog, entries: "SimpleQueue[NodeEntry | _End]") -> None:
    try:
        for entry in log.follow():
            entries.put(NodeEntry(node, entry))
    except Exception as error:  # passed on to the reader
        entries.put(_End(error))
    else:
        entries.put(_End())
