"""One training step after another: timed, counted, stopped when asked, ended when the loss is lost."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from topwork.errors import DataError
from topwork.progress import Tracker
from topwork.training.course import Course
from topwork.workspace import Workspace

# Reading the loss waits for the device: often enough to end soon, too seldom to be felt.
STEPS_BETWEEN_LOOKS = 20


class StopAsked(Exception):  # noqa: N818 - no error: it ends `fit` between two steps
    """The process was asked to stop, and the step it was in is complete."""


class Steps:
    """Stands in for Keras' train function and calls it, with what belongs to each step around it.

    A callback could not tell waiting for data from computing: Keras takes the next batch inside its own function.
    """

    def __init__(
        self,
        train: Callable[[Iterator[Any]], Any],
        course: Course,
        workspace: Workspace,
        *,
        steps_per_epoch: int,
        batch_size: int,
    ) -> None:
        """Prepare to count the steps of a phase.

        Args:
            train: Keras' own train function, which takes an iterator of batches and returns logs.
            course: How far the stage is; its `step` is counted here.
            workspace: Metrics, and the sign to stop.
            steps_per_epoch: Steps of an epoch.
            batch_size: Images a step over all replicas.
        """
        self._train = train
        self._course = course
        self._workspace = workspace
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self.tracker: Tracker | None = None

    def __call__(self, batches: Iterator[Any]) -> Any:
        """Run one step."""
        asked = time.perf_counter()
        batch = next(batches)
        began = time.perf_counter()
        logs = self._train(iter((batch,)))
        self._course.step += 1
        step, last = self._course.step, self._course.step == self._steps_per_epoch
        if last or step % STEPS_BETWEEN_LOOKS == 0:
            self._check(float(logs["loss"]))
        if self.tracker is not None:
            self.tracker.advance()
        ended = time.perf_counter()
        self._course.epoch_seconds += ended - asked
        self._workspace.metrics.step(self._batch_size, ended - asked, began - asked)
        # The epoch's end has its own look at the sign to stop, once its row is written.
        if self._workspace.stop.is_set() and not last:
            raise StopAsked
        return logs

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise DataError(
                f"The loss is {loss} in epoch {self._course.epoch + 1} by step {self._course.step}: training has come "
                "apart. Take a smaller learningRate (a tenth), or clip the gradients with optimizer.clipnorm: 1.0. "
                "The checkpoint of the epoch before is kept."
            )
