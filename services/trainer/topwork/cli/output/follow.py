"""Following a run on a terminal or in a log file, until its end; returns its exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from topwork.cli.output.status_printer import format_elapsed, format_metric
from topwork.clients.kubernetes.errors import NotFoundError
from topwork.cluster.names import Role
from topwork.cluster.operations.follow import ConnectionStatus, RunFollower, RunGoneError
from topwork.cluster.operations.follow_transfer_job import TransferJobFollower
from topwork.cluster.operations.run_watcher import FollowTimings
from topwork.cluster.status.attempts import Attempt, ContainerStatus, describe_end
from topwork.cluster.status.job_status import NEW_POD_FOLLOWS
from topwork.cluster.status.nodes import current_attempts
from topwork.cluster.status.run_status import EpochProgress, RunStatus
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended."""


@dataclass(frozen=True)
class ConnectionOptions:
    """The options that selected the cluster, to repeat them in commands that are shown to the user.

    Attributes:
        namespace: The namespace.
        context: Context of the kubeconfig, if `--context` was given.
        kubeconfig: Kubeconfig file, if `--kubeconfig` was given.
    """

    namespace: str
    context: str | None = None
    kubeconfig: Path | None = None

    def command(self, subcommand: str, *options: str) -> str:
        """Return a topwork command line with these options.

        Example:
            >>> ConnectionOptions("vision").command("status cats", "--follow")
            'topwork status cats -n vision --follow'
        """
        context = f" --context {self.context}" if self.context else ""
        kubeconfig = f" --kubeconfig {self.kubeconfig}" if self.kubeconfig else ""
        return " ".join([f"topwork {subcommand} -n {self.namespace}{context}{kubeconfig}", *options])


class _Output(Protocol):
    prints_epochs: bool

    def print_line(self, line: str) -> None: ...

    def show(self, status: RunStatus) -> None: ...


class _PlainOutput:
    """Lines only: for pipes, files and CI logs."""

    prints_epochs = True

    def print_line(self, line: str) -> None:
        print(line, flush=True)

    def show(self, status: RunStatus) -> None:
        """Print nothing: without a terminal, a progress bar can't be updated in place."""


class _TerminalOutput:
    """Lines above a progress bar with stage, epoch and metric."""

    prints_epochs = False

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None, detail="")

    def print_line(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, status: RunStatus) -> None:
        epoch = status.epoch
        best = f"{epoch.epoch}/{epoch.epochs} best {format_metric(epoch.metric, epoch.best)}" if epoch else ""
        self._progress.update(
            self._task,
            description=f"{status.phase} {status.stage or ''}".strip(),
            total=epoch.epochs if epoch else None,
            completed=epoch.epoch if epoch else 0,
            detail=best,
        )


@contextmanager
def _open_output() -> Iterator[_Output]:
    if not sys.stdout.isatty():
        yield _PlainOutput()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(), transient=True) as progress:
        yield _TerminalOutput(progress)


def follow(
    cluster: "Cluster",
    run: str,
    connection: ConnectionOptions,
    role: Role = "training",
    timings: FollowTimings | None = None,
) -> int:
    """Show the progress of a run until it is finished.

    Args:
        cluster: The cluster.
        run: Name of the run.
        connection: The options that selected the cluster.
        role: The Job to follow to its end.
        timings: Intervals and timeouts.

    Returns:
        The exit code of the run; 130 after Ctrl-C, which does not stop the run.

    Raises:
        SettingError: If the run does not exist, or the API server rejects a request.
        UnavailableError: If the API server does not respond for too long.
    """
    return _follow(RunFollower(cluster, run, role, timings).statuses(), run, connection)


def follow_transfer_job(
    cluster: "Cluster", name: str, connection: ConnectionOptions, timings: FollowTimings | None = None
) -> int:
    """Show the progress of a TransferJob until its run is finished, across suspensions and changes of its spec.

    Args:
        cluster: The cluster.
        name: Name of the TransferJob.
        connection: The options that selected the cluster.
        timings: Intervals and timeouts.

    Returns:
        The exit code of the run; 143 if it is canceled, 130 after Ctrl-C, which does not stop the run.

    Raises:
        SettingError: If the TransferJob does not exist, or the API server rejects a request.
        UnavailableError: If the API server does not respond for too long.
    """
    return _follow(TransferJobFollower(cluster, name, timings).statuses(), name, connection)


def _follow(statuses: Iterator[RunStatus | ConnectionStatus], name: str, connection: ConnectionOptions) -> int:
    reattach = f"Follow it again with: {connection.command(f'status {name}', '--follow')}"
    try:
        with _open_output() as output:
            return _print_statuses(statuses, output)
    except KeyboardInterrupt:
        print(f"\nThe job continues. {reattach}")
        return INTERRUPTED
    except (RunGoneError, NotFoundError):
        raise  # nothing continues
    except (SettingError, UnavailableError) as error:
        raise type(error)(f"{error}\nThe job continues. {reattach}") from error


def _print_statuses(statuses: Iterator[RunStatus | ConnectionStatus], output: _Output) -> int:
    reporter = ProgressReporter()
    for status in statuses:
        if isinstance(status, ConnectionStatus):
            problem = f"the API server does not respond: {status.error}"
            output.print_line(problem if status.error else "the API server responds again")
            continue
        for line in reporter.lines(status, epochs=output.prints_epochs):
            output.print_line(line)
        output.show(status)
        if status.is_finished:
            return status.exit_code or 0
    raise AssertionError("a run is followed until it is finished")


class ProgressReporter:
    """Converts successive statuses of a run to lines, without repeating any."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, ...]] = set()
        self._phase: str | None = None
        self._epoch: EpochProgress | None = None

    def lines(self, status: RunStatus, *, epochs: bool = True) -> Iterator[str]:
        """Describe what is new in a status.

        Args:
            status: The status.
            epochs: Whether to add a line for each epoch.

        Yields:
            Lines.
        """
        current = current_attempts(status.attempts).values()
        for attempt in status.attempts:
            # The end of the last attempt is reported as the end of the run.
            yield from self._attempt_lines(status, attempt, is_last=status.is_finished and attempt in current)
        if status.epoch and status.epoch != self._epoch and epochs:
            yield _epoch_line(status.epoch)
        self._epoch = status.epoch or self._epoch
        yield from self._phase_lines(status)

    def _attempt_lines(self, status: RunStatus, attempt: Attempt, *, is_last: bool) -> Iterator[str]:
        if attempt.current_container and self._is_new(attempt.pod, "attempt started"):
            yield self._start_line(status, attempt)
        # The stages of other nodes are those of node 0.
        for container in attempt.containers if attempt.index == 0 else ():
            if container.state != "waiting" and self._is_new(attempt.pod, container.stage, "started"):
                yield f"{container.stage} started"
            if container.state == "done" and self._is_new(attempt.pod, container.stage, "done"):
                yield _done_line(container)
        if attempt.state in {"failed", "stopped"} and not is_last and self._is_new(attempt.pod, "attempt ended"):
            code = f" with exit code {attempt.exit_code}" if attempt.exit_code else ""
            subject = f"attempt {attempt.number}{_of_node(status, attempt)}"
            yield f"{subject} ended{code}: {attempt.error or 'no reason given'}"

    def _start_line(self, status: RunStatus, attempt: Attempt) -> str:
        started = f"started on {'node' if status.nodes == 1 else 'machine'} {attempt.node} (pod {attempt.pod})"
        if attempt.number == 1:
            return started if status.nodes == 1 else f"node {attempt.index} {started}"
        previous = next(
            other for other in status.attempts if (other.index, other.number) == (attempt.index, attempt.number - 1)
        )
        code = f" after exit code {previous.exit_code}" if previous.exit_code else ""
        return f"attempt {attempt.number}{_of_node(status, attempt)}{code}: {started}"

    def _phase_lines(self, status: RunStatus) -> Iterator[str]:
        has_changed, self._phase = status.phase != self._phase, status.phase
        if status.is_finished:
            yield from _end_lines(status)
        elif status.phase == "running":
            return
        elif not status.reason:
            if has_changed:
                yield status.phase
        else:
            yield from self._reason_line(status, status.reason)

    def _reason_line(self, status: RunStatus, reason: str) -> Iterator[str]:
        last = status.attempts[-1] if status.attempts else None
        if last and last.is_finished:
            # Its end has already been reported.
            reason = reason.removeprefix(f"{describe_end(last)}; ")
        if reason != NEW_POD_FOLLOWS and self._is_new(last.pod if last else "", status.phase, reason):
            yield f"{status.phase}: {reason}"

    def _is_new(self, *item: str) -> bool:
        is_new = item not in self._reported
        self._reported.add(item)
        return is_new


def _of_node(status: RunStatus, attempt: Attempt) -> str:
    return f" of node {attempt.index}" if status.nodes > 1 else ""


def _epoch_line(epoch: EpochProgress) -> str:
    metric = format_metric(epoch.metric, epoch.value)
    best = f" (best {epoch.best:.4f})" if epoch.best is not None and epoch.best != epoch.value else ""
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}" + (f": {metric}{best}" if metric else "")


def _done_line(container: ContainerStatus) -> str:
    message = container.termination_message
    metric = format_metric(message.metric, message.value) if message else ""
    duration = format_elapsed(container.started, container.ended)
    return f"{container.stage} done in {duration}" + (f": {metric}" if metric else "")


def _end_lines(status: RunStatus) -> Iterator[str]:
    if status.phase == "failed":
        yield f"failed with exit code {status.exit_code}: {status.error or 'no reason given'}"
        return
    if status.phase == "cancelled":
        yield f"cancelled: {status.error}" if status.error else "cancelled"
        return
    duration = f" in {format_elapsed(status.created, status.ended)}" if status.ended else ""
    metric = format_metric(status.metric, status.value)
    yield f"succeeded{duration}" + (f": {metric}" if metric else "")
    if status.model:
        yield f"model {status.model}"
