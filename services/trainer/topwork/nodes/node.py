"""The place of this process among the nodes of a run."""

from dataclasses import dataclass

PEER_TIMEOUT_SECONDS = 1200.0
"""Time in which all nodes must have started. New machines of a cluster autoscaler take about ten minutes."""


@dataclass(frozen=True)
class Node:
    """The place of this process among the nodes of a run. The default is the only node.

    Attributes:
        index: Index of this node, from 0. Node 0 is the chief: it pulls, stores and publishes.
        addresses: host:port of TensorFlow's server on each node, in the order of their indices; empty on a single node.
        coordinator: host:port at which node 0 waits for the others; empty on a single node.
        peer_timeout_seconds: Time in which all nodes must have started.
    """

    index: int = 0
    addresses: tuple[str, ...] = ()
    coordinator: str = ""
    peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS

    @property
    def count(self) -> int:
        """Number of nodes."""
        return max(1, len(self.addresses))

    @property
    def is_chief(self) -> bool:
        """Whether this node pulls, stores and publishes."""
        return self.index == 0
