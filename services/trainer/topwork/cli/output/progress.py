"""Progress bars on terminals, and nothing elsewhere: bars would garble the log of a pod."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from topwork.cli.runtime.logging import stderr_console
from topwork.progress import Fact, Progress, Tracker


def open_progress() -> Progress:
    """Return progress bars if standard error is a terminal, otherwise no progress display."""
    return ProgressBars(stderr_console()) if sys.stderr.isatty() else NoProgress()


class NoProgress(Progress):
    """Shows nothing."""

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Show nothing."""
        yield _NoTracker()


class _NoTracker:
    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Show nothing."""


class ProgressBars(Progress):
    """Shows a rich progress bar with the remaining time while a block runs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Show a bar until the block ends."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        with RichProgress(*columns, console=self._console, transient=True) as bars:
            yield _BarTracker(bars, what, total)


class _BarTracker:
    def __init__(self, bars: RichProgress, what: str, total: int | None) -> None:
        self._bars = bars
        self._task = bars.add_task(what, total=total, facts="")

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Move the bar."""
        self._bars.update(self._task, advance=count, facts=format_facts(facts))


def format_facts(facts: Mapping[str, Fact]) -> str:
    """Format values such as the loss for a progress display."""
    return " ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
    )
