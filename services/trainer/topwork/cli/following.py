"""Following a run on a terminal or in a log, to its end and its exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from topwork.cli.narration import Narration
from topwork.cli.views import best
from topwork.cluster.following import Following, Role, Trouble
from topwork.cluster.sources import Pace
from topwork.cluster.state import RunState
from topwork.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from topwork.edge.kubernetes import Cluster

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
