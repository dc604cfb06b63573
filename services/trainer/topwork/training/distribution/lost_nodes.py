"""Lost nodes: converts the errors of TensorFlow's collective operations to an error that is retried."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import tensorflow as tf

from topwork.errors import UnavailableError, quote_error
from topwork.nodes.group import NodeGroup

log = structlog.get_logger(__name__)


@contextmanager
def report_lost_nodes(nodes: NodeGroup) -> Iterator[None]:
    """Convert errors of TensorFlow in the block to the reason why another node failed.

    Args:
        nodes: The nodes that train the run; on a single node, errors are not converted.

    Raises:
        UnavailableError: If another node failed or was lost.
        Stopped: If another node was stopped.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if nodes.count == 1:
            raise
        log.warning("collective operation failed", node=nodes.index, reason=quote_error(error))
        failure = nodes.peer_failure() or UnavailableError(
            f"Lost the connection to another node: {quote_error(error)}. The checkpoint is kept: start the same job "
            "again to resume."
        )
        raise failure from error
