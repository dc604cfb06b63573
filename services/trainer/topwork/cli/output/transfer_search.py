"""Printing TransferSearches in a cluster: as a table, in detail, as JSON, and while they run."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from topwork.cli.output.follow import INTERRUPTED, ConnectionOptions
from topwork.cli.output.status_printer import COLUMN_GAP, format_elapsed
from topwork.cli.output.tables import format_table
from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.errors import NotFoundError
from topwork.cluster.operations.transfer_searches import follow_search
from topwork.cluster.status.objects import creation_time, name_of, one_line
from topwork.cluster.status.transfer_search import read_transfer_search_status
from topwork.cluster.transfer_search_status import TransferSearchStatus
from topwork.errors import DataError, GateError, Stopped, UnavailableError, shorten

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

COLUMNS = ("SEARCH", "TRIALS", "RUNNING", "BEST", "AGE", "STATUS")
MAX_STATUS_LENGTH = 100
EXIT_CODES = {
    "GateNotMet": GateError.exit_code,
    "Unavailable": UnavailableError.exit_code,
    "DeadlineExceeded": UnavailableError.exit_code,
    "PublishingCancelled": Stopped.exit_code,
}
"""Exit codes of failed searches by the reason of the condition Failed."""


def format_searches(searches: Sequence[KubernetesObject], *, show_namespace: bool = False) -> Iterator[str]:
    """Format searches as a table, newest first.

    Args:
        searches: TransferSearches.
        show_namespace: Whether to add a column with the namespace.

    Yields:
        Lines.
    """
    columns = ["NAMESPACE", *COLUMNS] if show_namespace else [*COLUMNS]
    newest = sorted(searches, key=lambda obj: str(obj["metadata"].get("creationTimestamp")), reverse=True)
    rows = [[obj["metadata"]["namespace"], *_cells(obj)] if show_namespace else _cells(obj) for obj in newest]
    return format_table(columns, rows, text_columns=len(columns), gap=COLUMN_GAP)


def _cells(obj: KubernetesObject) -> list[str]:
    status = read_transfer_search_status(obj)
    reason = one_line(status.waiting_for or (status.error if status.state == "Failed" else None) or "")
    line = f"{status.state.lower()}: {reason}" if reason else status.state.lower()
    return [
        name_of(obj),
        status.progress or "",
        str(status.trials.running),
        status.metric or "",
        format_elapsed(creation_time(obj)),
        shorten(line, MAX_STATUS_LENGTH) or "",
    ]


def format_search(obj: KubernetesObject) -> Iterator[str]:
    """Format all details of a search.

    Args:
        obj: The TransferSearch.

    Yields:
        Lines.
    """
    status = read_transfer_search_status(obj)
    yield f"transfersearch/{name_of(obj)} in namespace {obj['metadata']['namespace']}: {status.state.lower()}"
    counts = status.trials.model_dump()
    fields = {
        "search": status.search,
        "age": format_elapsed(creation_time(obj)),
        "trials": f"{status.progress} finished: {_join_counts(counts)}" if status.progress else None,
        "best": f"{status.metric}, trial {status.best.trial}" if status.best else None,
        "gpu time": f"{status.gpu_seconds / 3600:.2f} GPU-hours" if status.gpu_seconds else None,
        "reason": status.waiting_for,
        "end": status.end_reason,
        "error": status.error,
        "model": status.model,
    }
    for name, value in fields.items():
        if value:
            first, *more = value.splitlines()
            yield f"  {name:<8}  {first}"
            yield from (f"{'':<12}{line}" for line in more)
    if status.best:
        yield ""
        yield "best parameters:"
        yield from (f"  {name}: {value}" for name, value in status.best.params.items())


def _join_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"


def search_to_json(obj: KubernetesObject) -> dict[str, Any]:
    """Return the name, namespace and status of a search as JSON types."""
    status = read_transfer_search_status(obj).model_dump(mode="json", by_alias=True)
    return {"name": name_of(obj), "namespace": obj["metadata"]["namespace"], **status}


def next_commands(obj: KubernetesObject, connection: ConnectionOptions) -> Iterator[str]:
    """Yield the commands that the user most likely needs next."""
    status, name = read_transfer_search_status(obj), f"transfersearch/{name_of(obj)}"
    if status.state == "Complete" and status.model:
        yield f"see  topwork models show {status.model.rstrip('/')}"
    elif not status.is_final:
        yield f"trials  {connection.command('list')}"
        yield f"follow  {connection.command(f'status {name}', '--follow')}"
        yield f"stop    {connection.command(f'cancel {name}')}"


def follow(cluster: "Cluster", name: str, connection: ConnectionOptions, ended: datetime | None = None) -> int:
    """Print a line for each change of a search, until it is finished or the user presses Ctrl-C.

    Args:
        cluster: The cluster.
        name: Name of the TransferSearch.
        connection: The options that selected the cluster.
        ended: When it ended before it was submitted again.

    Returns:
        The exit code: that of `exit_code_of`; 143 if it was deleted, 130 after Ctrl-C.
    """
    previous, status = "", TransferSearchStatus()
    try:
        for status in follow_search(cluster, name, ended):
            if (line := _describe(status)) != previous:
                previous = line
                print(line, flush=True)
    except KeyboardInterrupt:
        print(f"\nThe search continues. Follow it with: {connection.command(f'status {name}', '--follow')}")
        return INTERRUPTED
    except NotFoundError:
        print(f"transfersearch/{name} was deleted")
        return Stopped.exit_code
    if status.state == "Complete":
        print(f"model  {status.model}")
    return exit_code_of(status)


def exit_code_of(status: TransferSearchStatus) -> int:
    """Return the exit code of a finished search.

    Returns:
        0 if it is complete, 3 if a gate was not met, 75 if storage, the network or the deadline ended the publication,
        143 if it was canceled, and 2 if its spec is invalid or no trial is complete.
    """
    if status.state == "Complete":
        return 0
    if status.state == "Cancelled":
        return Stopped.exit_code
    failed = status.condition("Failed")
    return EXIT_CODES.get(failed.reason, DataError.exit_code) if failed else DataError.exit_code


def _describe(status: TransferSearchStatus) -> str:
    trials = f"{status.progress} trials finished, {status.trials.running} running" if status.progress else ""
    best = f"best {status.metric}" if status.metric else ""
    error = status.error if status.state == "Failed" else None
    return ": ".join(filter(None, (status.state, "; ".join(filter(None, (trials, best, status.waiting_for, error))))))
