"""One training step after another: timed, counted, stopped when asked, ended when the loss is lost."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from topwork.errors import DataError
from topwork.progress import Tracker
from topwork.training.input_stalls import HoldUps
from topwork.training.train_state import Course
from topwork.workspace import Workspace

# Reading the loss waits for the device: often enough to end soon, too seldom to be felt.
STEPS_BETWEEN_LOOKS = 20
MOST_NAMES = 20
"""Images that an error names; the log names them all."""


class StopAsked(Exception):  # noqa: N818 - no error: it ends `fit` between two steps
    """The process was asked to stop, and the step it was in is complete."""


class Surroundings(Protocol):
    """What a step needs to know of the training around it."""

    course: Course

    def is_due(self) -> bool:
        """Whether a checkpoint is to be stored in the middle of this epoch."""

    def save(self) -> None:
        """Store a checkpoint beside training."""

    def names(self, step: int) -> Sequence[str]:
        """Origins of the images of a step of the epoch that runs, counted from 1."""


class Steps:
    """Stands in for Keras' train function and calls it, with what belongs to each step around it.

    A callback could not tell waiting for data from computing: Keras takes the next batch inside its own function.
    """

    def __init__(
        self,
        train: Callable[[Iterator[Any]], Any],
        training: Surroundings,
        workspace: Workspace,
        *,
        steps_per_epoch: int,
        batch_size: int,
    ) -> None:
        """Prepare to count the steps of a phase.

        Args:
            train: Keras' own train function, which takes an iterator of batches and returns logs.
            training: The training around the steps; the `step` of its course is counted here.
            workspace: Metrics, and the sign to stop.
            steps_per_epoch: Steps of an epoch.
            batch_size: Images a step over all replicas.
        """
        self._train = train
        self._training = training
        self._workspace = workspace
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._losses: list[Any] = []
        self._holdups = HoldUps()
        self.tracker: Tracker | None = None

    def __call__(self, batches: Iterator[Any]) -> Any:
        """Run one step."""
        asked = time.perf_counter()
        batch = next(batches)
        self._holdups.step(asked, time.perf_counter())
        logs = self._train(iter((batch,)))
        course = self._training.course
        course.step += 1
        self._losses.append(logs["loss"])
        if self.tracker is not None:
            self.tracker.advance()
        last, stopped = course.step == self._steps_per_epoch, self._workspace.stop.is_set()
        due = not last and (stopped or self._training.is_due())
        # No checkpoint is stored of a training that is lost: the one before it is worth more.
        if last or due or course.step % STEPS_BETWEEN_LOOKS == 0:
            self._look()
            self._settle()
        ended = time.perf_counter()
        course.epoch_seconds += ended - asked
        self._workspace.metrics.step(self._batch_size, ended - asked)
        # The epoch's end has its own look at the sign to stop, once its row is written.
        if stopped and not last:
            raise StopAsked
        if due:
            self._training.save()
        return logs

    def _settle(self) -> None:
        """Account for the time since the last look: the device has done all that it was given."""
        waited, computed = self._holdups.settle(time.perf_counter())
        self._training.course.epoch_wait_seconds += waited
        self._workspace.metrics.spent(waited, computed)

    def _look(self) -> None:
        """Find the first step since the last look whose loss is no number, which the means after it are not either."""
        course, losses = self._training.course, self._losses
        self._losses = []
        if math.isfinite(float(losses[-1])):
            return
        values = [float(loss) for loss in losses]
        first = next(index for index, value in enumerate(values) if not math.isfinite(value))
        step = course.step - len(values) + first + 1
        self._workspace.metrics.loss_not_finite()
        names = self._training.names(step)
        words = f"The loss is {values[first]} in epoch {course.epoch + 1} at step {step}"
        self._workspace.progress.note("loss is not finite", epoch=course.epoch + 1, step=step, images=", ".join(names))
        raise lost(words, names)


def lost(what: str, names: Sequence[str]) -> DataError:
    """Say that training has come apart.

    Args:
        what: What was seen, where and when.
        names: Origins of the images that were in work.

    Returns:
        The error to raise.
    """
    more = f" and {len(names) - MOST_NAMES} more, which the log names" if len(names) > MOST_NAMES else ""
    return DataError(
        f"{what}: training has come apart. Take a smaller learningRate (a tenth), or clip the gradients with "
        "optimizer.clipnorm: 1.0, and look at the images of this step if they are odd: "
        f"{', '.join(names[:MOST_NAMES])}{more}. The last good checkpoint is kept."
    )
