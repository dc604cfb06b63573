"""Several nodes as threads of one process: their collective operations wait for each other, without a network."""

import json
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from topwork.errors import TopworkError, UnavailableError
from topwork.nodes.group import NodeGroup
from topwork.nodes.node import Node

TIMEOUT_SECONDS = 120.0
"""Time after which a node that the others wait for is considered to hang."""


class _Exchange:
    """What the nodes exchange: in each round, one value of each node."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._changed = threading.Condition()
        self._round_of = [0] * count
        self._rounds: dict[int, dict[int, tuple[str, Any]]] = {}
        self._failure = ""

    def swap(self, index: int, operation: str, value: Any) -> list[Any]:
        """Return the values of all nodes.

        Raises:
            AssertionError: If the nodes call different operations, or one of them hangs.
            UnavailableError: If one of them failed before.
        """
        with self._changed:
            calls = self._rounds.setdefault(self._round_of[index], {})
            self._round_of[index] += 1
            calls[index] = (operation, value)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(calls) == self._count or self._failure, TIMEOUT_SECONDS)
            if len(calls) < self._count and self._failure:
                raise UnavailableError(self._failure)
        assert len(calls) == self._count, f"Only nodes {sorted(calls)} of {self._count} called {operation}"
        assert len({name for name, _ in calls.values()}) == 1, f"The nodes call different operations: {calls}"
        return [calls[node][1] for node in range(self._count)]

    def fail(self, index: int, error: BaseException) -> None:
        """End the operations for which this node is still missing."""
        with self._changed:
            self._failure = self._failure or f"Node {index} failed: {error}"
            self._changed.notify_all()


class ThreadNodes(NodeGroup):
    """A node that is a thread. Values pass through JSON, as they would through a network."""

    def __init__(self, index: int, count: int, exchange: _Exchange) -> None:
        super().__init__(Node(index, tuple(f"node-{number}:1" for number in range(count)), "node-0:2"))
        self._exchange = exchange

    def broadcast(self, value: Any) -> Any:
        return self._swap("broadcast", value if self.is_chief else None)[0]

    def gather(self, value: Any) -> list[Any]:
        return self._swap("gather", value)

    def concatenate_on_chief(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        parts = self._exchange.swap(self.index, "concatenate_on_chief", np.array(rows))
        return np.concatenate(parts) if self.is_chief else None

    def _swap(self, operation: str, value: Any) -> list[Any]:
        return [json.loads(text) for text in self._exchange.swap(self.index, operation, json.dumps(value))]


def run_on_nodes(count: int, function: Callable[[NodeGroup], Any]) -> list[Any]:
    """Run a function on several nodes at the same time.

    Args:
        count: Number of nodes.
        function: Called with the nodes as each node sees them.

    Returns:
        For each node, the result or the `TopworkError` that the function raised.

    Raises:
        BaseException: Any other error of a node.
    """
    exchange = _Exchange(count)
    outcomes: list[Any] = [None] * count
    bugs: list[BaseException] = []

    def run(index: int) -> None:
        try:
            outcomes[index] = function(ThreadNodes(index, count, exchange))
        except BaseException as error:
            outcomes[index] = error
            exchange.fail(index, error)
            if not isinstance(error, TopworkError):
                bugs.append(error)

    threads = [threading.Thread(target=run, args=(index,), name=f"node-{index}") for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if bugs:
        raise bugs[0]
    return outcomes
