"""What is said while a run is followed: each thing once, when it happens."""

from collections.abc import Iterator

from topwork.cli.views import best, since
from topwork.cluster.attempts import Attempt, Container
from topwork.cluster.epochs import Epoch
from topwork.cluster.standing import FOLLOWS, ended
from topwork.cluster.state import RunState


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
