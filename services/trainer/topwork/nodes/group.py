"""The nodes that train a run together, and the decisions on which they agree."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from topwork.errors import TopworkError
from topwork.nodes.node import Node

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCKING_SECONDS = 60
"""Time for TensorFlow to connect the nodes. It takes about a second after all of them are ready."""


class NodeGroup:
    """The nodes of a run. This class is a single node, which agrees with itself; `ConnectedNodes` are several.

    Every method is a collective operation: all nodes must call the same methods in the same order. A branch must
    therefore never depend on local state, such as free disk space, the time, or a stop request: agree on it first.

    Attributes:
        node: This node.
        facts: What each node reported when it joined, in the order of their indices.
    """

    def __init__(self, node: Node | None = None, facts: Sequence[dict[str, Any]] = ()) -> None:
        """Initialize a single node."""
        self.node = node or Node()
        self.facts = list(facts)

    @property
    def index(self) -> int:
        """Index of this node, from 0."""
        return self.node.index

    @property
    def count(self) -> int:
        """Number of nodes."""
        return self.node.count

    @property
    def is_chief(self) -> bool:
        """Whether this node is the one that stores results."""
        return self.node.is_chief

    def broadcast(self, value: Any) -> Any:
        """Return the value of the chief on every node.

        Args:
            value: A JSON value; ignored on other nodes than the chief.

        Raises:
            UnavailableError: If a node failed or cannot be reached.
            Stopped: If a node was stopped.
        """
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all nodes, in the order of their indices.

        Args:
            value: A JSON value.
        """
        return [value]

    def concatenate_on_chief(self, rows: "npt.NDArray[Any]") -> "npt.NDArray[Any] | None":
        """Concatenate an array of each node along its first axis.

        Args:
            rows: Array of this node, (rows, ...); only the number of rows may differ between nodes.

        Returns:
            The rows of node 0, then of node 1, etc.; None on other nodes than the chief.
        """
        return rows

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any node."""
        return any(self.gather(flag))

    def all(self, flag: bool) -> bool:
        """Return whether the flag is true on all nodes."""
        return all(self.gather(flag))

    def require_equal(self, what: str, value: str) -> None:
        """Require that a value is the same on all nodes.

        Args:
            what: Name of the value, for the error message.
            value: The value of this node, such as a hash of weights.

        Raises:
            RuntimeError: If the values differ, which is a bug.
        """
        values = self.gather(value)
        if len(set(values)) > 1:
            raise RuntimeError(f"{what} differs between the nodes: {values}. This is a bug in topwork.")

    def peer_failure(self) -> TopworkError | None:
        """Return why another node failed, to explain an error of TensorFlow's collective operations.

        This is not a collective operation. It waits a few seconds until a failure is known.

        Returns:
            `Stopped` if a node was stopped, UnavailableError if it failed or was lost; None if all nodes are alive.
        """
        return None

    def on_failure(
        self,
        callback: Callable[[TopworkError], None],
        *,
        draft: Callable[[TopworkError | None], None] = lambda _: None,
    ) -> None:
        """Set a function that ends this process after another node failed, if the main thread has not ended it.

        Args:
            callback: Called in a background thread with the error of the other node, `EXIT_SECONDS` after it failed;
                not called after `close` or `fail`.
            draft: Called with the error that applies if the process ends during `blocking`, and with None after it.
        """

    @contextmanager
    def blocking(self, seconds: int = BLOCKING_SECONDS) -> Iterator[None]:
        """Announce that the block may block all threads of Python, so that this node sends no heartbeat.

        TensorFlow does that while it connects to the servers of the other nodes. If it takes too long, the process ends
        with the exit code of UnavailableError. This is not a collective operation.

        Args:
            seconds: Longest duration of the block.
        """
        yield

    def fail(self, error: BaseException) -> None:
        """Leave the group, and tell the other nodes why this one failed. They raise UnavailableError or `Stopped`.

        Args:
            error: The error that ends this node; secrets in its message are redacted.
        """

    def close(self) -> None:
        """Leave the group in good order, after the last collective operation. Later failures of others are ignored."""
