"""Following a run on a terminal or in a log, to its end and its exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from topwork.cli.output.run_status import best, since
from topwork.cluster.operations.follow import Following, Role, Trouble
from topwork.cluster.operations.run_events import Pace
from topwork.cluster.status.attempts import Attempt, Container
from topwork.cluster.status.epochs import Epoch
from topwork.cluster.status.phase import FOLLOWS, ended
from topwork.cluster.status.run_state import RunState
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended."""


@dataclass(frozen=True)
class Where:
    """How the user came to the cluster, so that the next command that is shown goes there too.

    Attributes:
        namespace: The namespace.
        context: Context of the kubeconfig, if one was named.
        kubeconfig: kubeconfig file, if one was named.
    """

    namespace: str
    context: str | None = None
    kubeconfig: Path | None = None

    def command(self, words: str, *options: str) -> str:
        """Write a command of topwork."""
        context = f" --context {self.context}" if self.context else ""
        kubeconfig = f" --kubeconfig {self.kubeconfig}" if self.kubeconfig else ""
        return " ".join([f"topwork {words} -n {self.namespace}{context}{kubeconfig}", *options])


class _Screen(Protocol):
    narrates_epochs: bool

    def say(self, line: str) -> None: ...

    def show(self, state: RunState) -> None: ...


class _Lines:
    """One line for each thing: for pipes, files and the logs of a pipeline."""

    narrates_epochs = True

    def say(self, line: str) -> None:
        print(line, flush=True)

    def show(self, state: RunState) -> None:
        """Show nothing that would have to be taken back."""


class _Bar:
    """A bar with stage, epoch and metric below the lines: for terminals."""

    narrates_epochs = False

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None, told="")

    def say(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, state: RunState) -> None:
        epoch = state.epoch
        self._bars.update(
            self._task,
            description=f"{state.phase} {state.stage or ''}".strip(),
            total=epoch.epochs if epoch else None,
            completed=epoch.epoch if epoch else 0,
            told=f"{epoch.epoch}/{epoch.epochs} best {best(epoch.metric, epoch.best)}" if epoch else "",
        )


@contextmanager
def _screen() -> Iterator[_Screen]:
    if not sys.stdout.isatty():
        yield _Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[told]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(), transient=True) as bars:
        yield _Bar(bars)


def follow(cluster: "Cluster", run: str, where: Where, role: Role = "training", pace: Pace | None = None) -> int:
    """Show how a run goes on, until it is over.

    Args:
        cluster: The cluster.
        run: Name of the run.
        where: How the user came to the cluster.
        role: The Job whose end is the end.
        pace: How often and how long.

    Returns:
        The exit code of the run; 130 after Ctrl-C, which leaves the run alone.

    Raises:
        SettingError: If the cluster refuses to tell.
        UnavailableError: If the API server does not answer for too long.
    """
    back = where.command(f"status {run}", "--follow")
    try:
        with _screen() as screen:
            return _follow(Following(cluster, run, role, pace), screen)
    except KeyboardInterrupt:
        print(f"\nThe job goes on. Come back with: {back}")
        return INTERRUPTED
    except (SettingError, UnavailableError) as error:
        raise type(error)(f"{error} The job goes on. Come back with: {back}") from error


def _follow(following: Following, screen: _Screen) -> int:
    narration = Narration()
    for state in following.states():
        if isinstance(state, Trouble):
            screen.say(
                f"the API server does not answer: {state.message}" if state.message else "the API server answers"
            )
            continue
        for line in narration.lines(state, epochs=screen.narrates_epochs):
            screen.say(line)
        screen.show(state)
        if state.is_over:
            return state.exit_code or 0
    raise AssertionError("a run is followed until it is over")


class Narration:
    """Turns states into lines, each of which says something new."""

    def __init__(self) -> None:
        self._told: set[tuple[str, ...]] = set()
        self._phase: str | None = None
        self._epoch: Epoch | None = None

    def lines(self, state: RunState, *, epochs: bool = True) -> Iterator[str]:
        """Say what is new in a state.

        Args:
            state: The state.
            epochs: Whether to say a line for each epoch.

        Yields:
            Lines.
        """
        for number, attempt in enumerate(state.attempts, 1):
            yield from self._attempt(state, attempt, number)
        if state.epoch and state.epoch != self._epoch and epochs:
            yield _epoch(state.epoch)
        self._epoch = state.epoch or self._epoch
        yield from self._standing(state)

    def _attempt(self, state: RunState, attempt: Attempt, number: int) -> Iterator[str]:
        if attempt.current and self._first(attempt.pod, "begun"):
            yield self._begun(state, attempt, number)
        for container in attempt.containers:
            if container.state != "waiting" and self._first(attempt.pod, container.stage, "started"):
                yield f"{container.stage} started"
            if container.state == "done" and self._first(attempt.pod, container.stage, "done"):
                yield _done(container)
        # The end of the last attempt is told as the end of the run.
        more = number < len(state.attempts) or not state.is_over
        if attempt.state in {"failed", "stopped"} and more and self._first(attempt.pod, "over"):
            code = f" with exit code {attempt.exit_code}" if attempt.exit_code else ""
            yield f"attempt {number} ended{code}: {attempt.error or 'no reason given'}"

    def _begun(self, state: RunState, attempt: Attempt, number: int) -> str:
        where = f"on node {attempt.node} (pod {attempt.pod})"
        if number == 1:
            return f"started {where}"
        before = state.attempts[number - 2]
        code = f"exit {before.exit_code}" if before.exit_code else "its end"
        return f"attempt {number} after {code}: started {where}"

    def _standing(self, state: RunState) -> Iterator[str]:
        changed, self._phase = state.phase != self._phase, state.phase
        if state.is_over:
            yield from _end(state)
        elif state.phase == "running":
            return
        elif not state.reason:
            if changed:
                yield state.phase
        else:
            yield from self._reason(state, state.reason)

    def _reason(self, state: RunState, reason: str) -> Iterator[str]:
        last = state.attempts[-1] if state.attempts else None
        if last and last.is_over:
            # Its end has been told.
            reason = reason.removeprefix(f"{ended(last)}; ")
        if reason != FOLLOWS and self._first(last.pod if last else "", state.phase, reason):
            yield f"{state.phase}: {reason}"

    def _first(self, *what: str) -> bool:
        new = what not in self._told
        self._told.add(what)
        return new


def _epoch(epoch: Epoch) -> str:
    told = best(epoch.metric, epoch.value)
    so_far = f" (best {epoch.best:.4f})" if epoch.best is not None and epoch.best != epoch.value else ""
    return f"{epoch.stage} epoch {epoch.epoch}/{epoch.epochs}" + (f": {told}{so_far}" if told else "")


def _done(container: Container) -> str:
    ending = container.ending
    told = best(ending.metric, ending.value) if ending else ""
    return f"{container.stage} done in {since(container.started, container.ended)}" + (f": {told}" if told else "")


def _end(state: RunState) -> Iterator[str]:
    if state.phase == "failed":
        yield f"failed with exit code {state.exit_code}: {state.error or 'no reason given'}"
        return
    took = f" in {since(state.created, state.ended)}" if state.ended else ""
    told = best(state.metric, state.value)
    yield f"succeeded{took}" + (f": {told}" if told else "")
    if state.model:
        yield f"model {state.model}"
