"""One training step of Keras: measured, checked for divergence, and followed by a checkpoint or stop if one is due."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from topwork.progress import Tracker
from topwork.training.divergence import first_non_finite
from topwork.training.input_stalls import InputStalls

if TYPE_CHECKING:
    from topwork.training.trainer import Trainer

# Reading the loss waits for the device: often enough to stop a diverged run soon, rarely enough not to slow it down.
STEPS_BETWEEN_LOSS_CHECKS = 20


class StopTraining(Exception):  # noqa: N818 - not an error: it ends `fit` between two steps
    """A stop was requested, and the current step is complete."""


class TrainStep:
    """Wraps Keras' train function: runs one step, measures it, checks the loss, and handles checkpoints and stops.

    A callback could not distinguish waiting for data from computing: Keras' train function itself takes the next batch.
    """

    def __init__(self, train_function: Callable[[Iterator[Any]], Any], trainer: "Trainer", tracker: Tracker) -> None:
        """Wrap a train function.

        Args:
            train_function: Keras' train function: takes an iterator of batches and returns logs.
            trainer: The trainer; steps are counted in its state.
            tracker: Progress bar of the steps.
        """
        self._train_function, self._trainer, self._tracker = train_function, trainer, tracker
        self._losses: list[Any] = []
        self._stalls = InputStalls()

    def __call__(self, batches: Iterator[Any]) -> Any:
        """Run one step.

        Args:
            batches: Iterator of batches.

        Returns:
            The logs of Keras' train function.

        Raises:
            StopTraining: If a stop was requested before the last step of the epoch. After the last step, the end of
                the epoch handles it, once its history row is written.
            DataError: If the loss is NaN or infinite.
        """
        trainer, state = self._trainer, self._trainer.state
        requested = time.perf_counter()
        batch = next(batches)
        self._stalls.add_step(requested, time.perf_counter())
        logs = self._train_function(iter((batch,)))
        state.step += 1
        self._losses.append(logs["loss"])
        self._tracker.advance()
        is_last, is_stopping = state.step == trainer.steps_per_epoch, trainer.workspace.stop.is_set()
        should_save = not is_last and (is_stopping or trainer.checkpoint_is_due())
        # The loss is checked before every checkpoint: a diverged model must not replace a good checkpoint.
        if is_last or should_save or state.step % STEPS_BETWEEN_LOSS_CHECKS == 0:
            self._check_losses()
            self._record_stalls()
        seconds = time.perf_counter() - requested
        state.epoch_seconds += seconds
        trainer.workspace.metrics.record_step(trainer.batch_size, seconds)
        if is_stopping and not is_last:
            raise StopTraining
        if should_save:
            trainer.save_checkpoint()
        return logs

    def _check_losses(self) -> None:
        losses, self._losses = self._losses, []
        if (non_finite := first_non_finite(losses)) is None:
            return
        index, value = non_finite
        epoch = self._trainer.state.epoch + 1
        step = self._trainer.state.step - len(losses) + index + 1
        raise self._trainer.divergence_error(f"The loss is {value} in epoch {epoch} at step {step}", epoch, step)

    def _record_stalls(self) -> None:
        waited, computed = self._stalls.take_totals(time.perf_counter())
        self._trainer.state.epoch_wait_seconds += waited
        self._trainer.workspace.metrics.record_step_time(waited, computed)
