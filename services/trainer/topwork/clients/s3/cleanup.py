"""Cleanup that must never fail a run: what is left behind occupies space, and `topwork gc` deletes it later."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from topwork.errors import Stopped, TopworkError

log = structlog.get_logger(__name__)


@contextmanager
def tolerate_cleanup_failure(what: str) -> Iterator[None]:
    """Log an error of the block as a warning, and continue after the block.

    Only for deletions that save space. A deletion that results depend on must fail the run.

    Args:
        what: What the block deletes, such as "checkpoints of transfer", for the warning.

    Example:
        ```python
        with tolerate_cleanup_failure("checkpoints of transfer"):
            storage.delete(stored.key for stored in storage.list("runs/cats-0f1e2d3c/transfer/checkpoints/"))
        ```
    """
    try:
        yield
    except Stopped:
        raise
    except TopworkError as error:
        log.warning("cleanup failed; topwork gc can delete it later", what=what, reason=str(error))
