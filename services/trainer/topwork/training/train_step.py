"""One training step: computed on all replicas, measured, checked for divergence, and followed by a checkpoint or stop.

With several nodes, the result of each step also contains whether a stop was requested on any node and whether the chief
wants to store a checkpoint: all nodes must do so after the same step.
"""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from topwork.progress import Tracker
from topwork.training.divergence import first_non_finite
from topwork.training.input_stalls import InputStalls

if TYPE_CHECKING:
    from topwork.training.trainer import Trainer

# Reading the loss waits for the device: often enough to stop a diverged run soon, rarely enough not to slow it down.
STEPS_BETWEEN_LOSS_CHECKS = 20

# Maps a batch and the requests of this node, float32 (requests,), to float32 (1 + requests,): the mean of the running
# loss over all replicas, and the requests summed over them.
StepFunction = Callable[[Any, Any], tf.Tensor]


class StopTraining(Exception):  # noqa: N818 - not an error: it ends training between two steps
    """A stop was requested, and the current step is complete."""


def make_step_function(model: keras.Model) -> StepFunction:
    """Create the function that runs Keras' `train_step` on all replicas of all nodes.

    `fit` does not work with several nodes (keras#20585). Optimizer and metrics must have their variables: creating
    those of a loss scale within the step fails with several replicas.

    Args:
        model: A compiled model, whose optimizer is built.
    """
    strategy = model.distribute_strategy
    replicas = strategy.num_replicas_in_sync

    def run_on_replica(batch: Any, requests: tf.Tensor) -> tf.Tensor:
        loss = tf.cast(model.train_step(batch)["loss"], tf.float32)
        return tf.concat([[loss / replicas], requests], axis=0)

    def run_on_all(batch: Any, requests: tf.Tensor) -> tf.Tensor:
        return strategy.reduce("SUM", strategy.run(run_on_replica, (batch, requests)), axis=None)

    function: StepFunction = tf.function(
        run_on_all, jit_compile=model.jit_compile, reduce_retracing=True, autograph=False
    )
    return function


class TrainStep:
    """Runs steps, measures them, checks the loss, and handles checkpoints and stops."""

    def __init__(self, function: StepFunction, trainer: "Trainer", tracker: Tracker) -> None:
        """Prepare the steps of a phase.

        Args:
            function: From `make_step_function`.
            trainer: The trainer; steps are counted in its state.
            tracker: Progress bar of the steps.
        """
        self._function, self._trainer, self._tracker = function, trainer, tracker
        self._results: list[tf.Tensor] = []
        self._stalls = InputStalls()
        self._requests = StepRequests(trainer)

    def __call__(self, batches: Iterator[Any]) -> None:
        """Run one step.

        Args:
            batches: Iterator of batches.

        Raises:
            StopTraining: If a stop was requested before the last step of the epoch. After the last step, the end of
                the epoch handles it, once its history row is written.
            DataError: If the loss is NaN or infinite.
        """
        trainer, state = self._trainer, self._trainer.state
        requested = time.perf_counter()
        batch = next(batches)
        self._stalls.add_step(requested, time.perf_counter())
        result = self._function(batch, self._requests.of_this_node())
        state.step += 1
        self._results.append(result)
        self._tracker.advance()
        is_last = state.step == trainer.steps_per_epoch
        is_stopping, is_due = self._requests.of_all_nodes(result, is_last=is_last)
        should_save = not is_last and (is_stopping or is_due)
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
            self._requests.clear()

    def _check_losses(self) -> None:
        results, self._results = self._results, []
        if (non_finite := first_non_finite(results)) is None:
            return
        index, value = non_finite
        epoch = self._trainer.state.epoch + 1
        step = self._trainer.state.step - len(results) + index + 1
        raise self._trainer.divergence_error(f"The loss is {value} in epoch {epoch} at step {step}", epoch, step)

    def _record_stalls(self) -> None:
        waited, computed = self._stalls.take_totals(time.perf_counter())
        self._trainer.state.epoch_wait_seconds += waited
        self._trainer.workspace.metrics.record_step_time(waited, computed)


class StepRequests:
    """Requests to stop or to store a checkpoint, on which the nodes agree with the result of a step.

    With several nodes, the requests in the result of a step are obeyed after the next one: reading a result waits for
    its step, and the device must have the next one to compute meanwhile. A single node obeys its own at once.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        self._is_single = trainer.workspace.nodes.count == 1
        self._none = tf.zeros(0)
        self._previous: tf.Tensor | None = None

    def of_this_node(self) -> tf.Tensor:
        """Return the requests of this node for the result of the next step, float32 (requests,)."""
        if self._is_single:
            return self._none
        trainer = self._trainer
        is_due = trainer.workspace.nodes.is_chief and trainer.checkpoint_is_due()
        return tf.constant([trainer.workspace.stop.is_set(), is_due], tf.float32)

    def of_all_nodes(self, result: tf.Tensor, *, is_last: bool) -> tuple[bool, bool]:
        """Return whether to stop, and whether to store a checkpoint, after the step that was just started.

        Args:
            result: Result of this step.
            is_last: Whether it is the last one of its epoch, whose end handles the requests.
        """
        if self._is_single:
            return self._trainer.workspace.stop.is_set(), self._trainer.checkpoint_is_due()
        previous, self._previous = self._previous, None if is_last else result
        if previous is None:
            return False, False
        _, stop, due = previous.numpy()
        return bool(stop), bool(due)

    def clear(self) -> None:
        """Forget the requests of the last step: a checkpoint was stored since."""
        self._previous = None
