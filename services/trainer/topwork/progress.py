"""What a person sees while a job runs: bars on a terminal, one line an epoch everywhere else."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from topwork.redaction import without_secrets

Fact = str | int | float | bool | None


class Tracker(Protocol):
    """Counts what is done of a known or unknown total."""

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Say that `count` more are done; `facts` (such as the loss) stand beside the bar."""


class Progress(Protocol):
    """Tells a person how a run goes on."""

    def note(self, message: str, **facts: Fact) -> None:
        """Say one thing, with the facts that belong to it, in one line."""

    def epoch(self, stage: str, epoch: int, epochs: int, **facts: Fact) -> None:
        """Say how epoch `epoch` (counted from 1) of `epochs` ended."""

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Follow work of `total` pieces (None: unknown) that is called `what`."""


class LineProgress:
    """One line for each thing said, as logfmt-like text or as JSON: for pods, pipes and files."""

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._json = as_json

    def note(self, message: str, **facts: Fact) -> None:
        """Write the message and its facts."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self._json:
            facts = {name: _in_json(value) for name, value in facts.items()}
            line = json.dumps({"time": stamp, "message": without_secrets(message), **facts})
        else:
            line = " ".join(
                [stamp, without_secrets(message), *(f"{name}={_shown(value)}" for name, value in facts.items())]
            )
        print(line, file=self._stream, flush=True)

    def text(self, text: str) -> None:
        """Write lines as they are: a traceback is for people."""
        print(without_secrets(text.rstrip()), file=self._stream, flush=True)

    def epoch(self, stage: str, epoch: int, epochs: int, **facts: Fact) -> None:
        """Write one line for the epoch."""
        self.note("epoch", stage=stage, epoch=epoch, epochs=epochs, **facts)

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Write nothing between the epochs: bars garble the logs of a pod."""
        yield _Silent()


class BarProgress:
    """Rich bars with the time that is left, and a line for each thing said: for terminals."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)

    def note(self, message: str, **facts: Fact) -> None:
        """Print the message and its facts."""
        line = Text(without_secrets(message))
        for name, value in facts.items():
            line.append(f"  {name} ", style="dim").append(_shown(value))
        self._console.print(line, soft_wrap=True)

    def epoch(self, stage: str, epoch: int, epochs: int, **facts: Fact) -> None:
        """Print one line for the epoch."""
        self.note(f"{stage} epoch {epoch}/{epochs}", **facts)

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Show a bar until the work is done."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        with RichProgress(*columns, console=self._console, transient=True) as bars:
            yield _Bar(bars, what, total)


class Quiet:
    """Says nothing."""

    def note(self, message: str, **facts: Fact) -> None:
        """Say nothing."""

    def epoch(self, stage: str, epoch: int, epochs: int, **facts: Fact) -> None:
        """Say nothing."""

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Show nothing."""
        yield _Silent()


class _Silent:
    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Show nothing."""


class _Bar:
    def __init__(self, bars: RichProgress, what: str, total: int | None) -> None:
        self._bars = bars
        self._task = bars.add_task(what, total=total, facts="")

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Move the bar."""
        shown = " ".join(f"{name} {_shown(value)}" for name, value in facts.items())
        self._bars.update(self._task, advance=count, facts=shown)


def _in_json(value: Fact) -> Fact:
    """JSON knows no nan and no infinity."""
    if isinstance(value, str):
        return without_secrets(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Fact) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        value = without_secrets(value)
    if isinstance(value, str) and (" " in value or '"' in value):
        return json.dumps(value)
    return str(value)
