"""Live view of a search on a terminal: its state, the running trial, and the best trials."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from topwork.cli.output.search_table import format_state, ranked, table_columns, table_row
from topwork.progress import Fact, Progress, Tracker
from topwork.search.study import Study
from topwork.search.trials import Trial
from topwork.spec.search import TransferSearch

SHOWN_TRIALS = 10


class SearchView(Progress):
    """Shows a search until the block ends. It is also the progress display of the trials.

    Example:
        ```python
        with SearchView(search, console) as view:
            view.observe(study)
        ```
    """

    def __init__(self, search: TransferSearch, console: Console) -> None:
        self._search = search
        self._trials: Sequence[Trial] = ()
        self._best: Trial | None = None
        self._operation = ""
        self._started = monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "SearchView":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def observe(self, study: Study) -> None:
        """Show the current state of the trials."""
        self._trials, self._best = study.trials, study.best

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator[Tracker]:
        """Show an operation of the running trial until the block ends."""
        try:
            yield _OperationTracker(self, what, total)
        finally:
            self._operation = ""

    def show_operation(self, text: str) -> None:
        """Show what the running trial does."""
        self._operation = text

    def _render(self) -> Group:
        elapsed = int(monotonic() - self._started)
        state = format_state(self._trials, self._best, self._search)
        header = Text(f"{self._search.metadata.name}: {state}; {elapsed // 60}:{elapsed % 60:02}", style="bold")
        if not self._trials:
            return Group(header, Text(self._operation, style="dim"))
        table = Table(box=None, pad_edge=False)
        for index, column in enumerate(table_columns(self._search)):
            table.add_column(column, justify="left" if index == 1 else "right")
        running = [trial for trial in self._trials if trial.state == "running"]
        finished = [trial for trial in self._trials if trial.state != "running"]
        for trial in [*running, *ranked(finished, self._search)[:SHOWN_TRIALS]]:
            cells = (Text(cell) for cell in table_row(trial, self._search))
            table.add_row(*cells, style="bold" if self._best and trial.number == self._best.number else None)
        return Group(header, table, Text(self._operation, style="dim"))


class _OperationTracker:
    def __init__(self, view: SearchView, what: str, total: int | None) -> None:
        self._view, self._what, self._total, self._count = view, what, total, 0
        self._show("")

    def advance(self, count: int = 1, **facts: Fact) -> None:
        """Show the number of completed items."""
        self._count += count
        values = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()
        )
        self._show(" ".join(values))

    def _show(self, facts: str) -> None:
        total = f" {self._count}/{self._total}" if self._total else ""
        self._view.show_operation(f"{self._what}{total} {facts}".rstrip())
