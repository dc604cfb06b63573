"""Observation of a run: records log events and completed steps, and runs an action at a chosen step or epoch."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from topwork.cli.output.progress import NoProgress


class RunObserver(NoProgress):
    """A progress display that calls `action` at a chosen step or epoch. Call `observe_log` to record log events.

    Attributes:
        events: Log events in order, as (event, fields).
        steps: Number of completed steps of each operation, such as `transfer`.
        on_step: Called after every step.
    """

    def __init__(
        self,
        at_step: tuple[str, int] | None = None,
        at_epoch: tuple[str, int] | None = None,
        action: Callable[[], object] = lambda: None,
    ) -> None:
        self.at_step, self.at_epoch, self.action = at_step, at_epoch, action
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.steps: Counter[str] = Counter()
        self.on_step: Callable[[], object] = lambda: None

    def observe_log(self) -> None:
        """Record log events from now on; the fixture `restore_process_settings` restores the configuration."""
        structlog.configure(processors=[self._record])

    def fields_of(self, event: str) -> list[dict[str, Any]]:
        """Fields of every occurrence of a log event."""
        return [fields for name, fields in self.events if name == event]

    @contextmanager
    def track(self, what: str, total: int | None) -> Iterator["_Steps"]:
        yield _Steps(self, what)

    def _record(self, _logger: object, _method: str, fields: dict[str, Any]) -> dict[str, Any]:
        event = fields.pop("event")
        self.events.append((event, fields))
        if event == "epoch" and (fields["stage"], fields["epoch"]) == self.at_epoch:
            self.action()
        raise structlog.DropEvent


class _Steps:
    def __init__(self, observer: RunObserver, what: str) -> None:
        self._observer, self._what = observer, what

    def advance(self, count: int = 1, **facts: object) -> None:
        observer = self._observer
        observer.steps[self._what] += count
        observer.on_step()
        if (self._what, observer.steps[self._what]) == observer.at_step:
            observer.action()
