"""Training of one stage, from top to bottom: `train` runs the phases, `Trainer` runs `fit`, `TrainStep` runs a step.

The stages `transfer` and `fine_tune` call `train` with their plan. Keras' own `fit` runs the epochs; the code here adds
what a preemptible job needs: checkpoints within an epoch, an exact resume, early stopping whose best weights survive a
restart, and the check that frozen weights did not change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import keras
import structlog
import tensorflow as tf

from topwork.data.batches import batch_image_names, training_batches
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError, Stopped
from topwork.model.classifier import computes_in_float16
from topwork.model.device_memory import report_exhausted_memory
from topwork.model.freezing import (
    frozen_variables,
    hash_variables,
    set_trainable,
    synchronize_batch_norm,
    verify_frozen_unchanged,
)
from topwork.registry.stage_results import (
    Classifier,
    HistoryRow,
    TrainingSummary,
    read_stage_result,
    store_stage_result,
)
from topwork.training import reporting
from topwork.training.checkpointing.checkpoints import Checkpoint, Checkpoints
from topwork.training.checkpointing.train_state import TrainState
from topwork.training.checkpointing.variables import StageVariables, all_finite
from topwork.training.divergence import diverged_error
from topwork.training.feature_cache.features import delete_features
from topwork.training.inputs import TrainingInputs, prepare_inputs, prepare_model
from topwork.training.losses import balanced_class_weights, loss_targets, make_accuracy, make_loss
from topwork.training.memory_allocation import keep_freed_memory
from topwork.training.optimizers import make_optimizer, moving_averages
from topwork.training.plan import StageContext, TrainingPhase
from topwork.training.preflight import check_data, check_metrics, check_replicas
from topwork.training.strategy import get_strategy, jit_compile
from topwork.training.train_step import StopTraining, TrainStep
from topwork.training.validation import create_validation

log = structlog.get_logger(__name__)


class CompletedElsewhere(Exception):  # noqa: N818 - not an error: the result is there
    """Another run with the same key completed the stage."""

    def __init__(self, result: Classifier) -> None:
        super().__init__(result.key)
        self.result = result


def train(
    context: StageContext,
    dataset: StoredDataset,
    build_model: Callable[[], keras.Model],
    earlier: Classifier | None = None,
) -> Classifier:
    """Train a stage from its start, or from its newest checkpoint, and store the result.

    Args:
        context: Job, plan and workspace of the stage.
        dataset: The stored dataset.
        build_model: Returns the initial classifier, in float32; called in the scope of the strategy.
        earlier: Result of the stage before, which `build_model` loads.

    Returns:
        The stored classifier with the kept weights.

    Raises:
        SpecError: If the settings do not suit the replicas or splits.
        DataError: If the data or the base cannot be used, or training diverges.
        Stopped: If a stop was requested; the checkpoint is stored.
    """
    job, plan, workspace = context.job, context.plan, context.workspace
    strategy = get_strategy(workspace.replicas)
    keep_freed_memory()
    for phase in plan.phases:
        check_replicas(strategy.num_replicas_in_sync, plan.batch_size, phase.optimizer)
    data = fetch_dataset(dataset, job, workspace)
    check_metrics(job, data)
    check_data(job, plan, data)
    workspace.metrics.set_replicas(strategy.num_replicas_in_sync)
    keras.utils.clear_session()
    keras.utils.set_random_seed(plan.seed)
    with strategy.scope():
        model, partition = prepare_model(build_model(), context)
    # A stop request waits until the step is complete and its checkpoint is stored.
    with (
        workspace.stop.deferred(),
        report_exhausted_memory(plan.batch_size_key, plan.batch_size, strategy.num_replicas_in_sync),
        Checkpoints(workspace, context.prefix, job.spec.compute.checkpoint_minutes) as checkpoints,
    ):
        inputs = prepare_inputs(context, model, partition, data)
        trainer = Trainer(context, model, inputs, checkpoints)
        workspace.metrics.set_planned_epochs(plan.stage, plan.epochs)
        classifier = trainer.fit() or store_stage_result(model, trainer.summarize(earlier), context.key, workspace)
        checkpoints.clear()
        delete_features(context)
    return classifier


class Trainer:
    """Trains the phases of a stage with Keras' `fit`, and resumes where the newest checkpoint was stored."""

    def __init__(
        self, context: StageContext, model: keras.Model, inputs: TrainingInputs, checkpoints: Checkpoints
    ) -> None:
        """Initialize the trainer, and restore the newest checkpoint if there is one.

        Args:
            context: Job, plan and workspace of the stage.
            model: Classifier with its nested base, built in the scope of the strategy.
            inputs: The model that `fit` trains, and its data.
            checkpoints: Checkpoints of the stage.

        Raises:
            DataError: If the checkpoint belongs to a different base.
        """
        self._context, self._plan, self.workspace = context, context.plan, context.workspace
        self._model, self._inputs, self._fit_model = model, inputs, inputs.model
        self._strategy = model.distribute_strategy
        self._checkpoints = checkpoints
        self._classes = len(inputs.data.class_names)
        self._loss = make_loss(self._plan.loss, self._classes)
        self._validation = create_validation(inputs.data, self._plan)
        self.batch_size = self._plan.batch_size
        self.steps_per_epoch = inputs.data.train.size // self.batch_size
        self._unfreeze(self._plan.phases[-1])
        self._variables = StageVariables(model, self._fit_model)
        if (checkpoint := checkpoints.newest()) is not None:
            self._variables.restore(checkpoint)
            self.state = checkpoint.state
            reporting.report_resume(self.state, context)
        else:
            started = self.workspace.metrics.stage_start_time(self._plan.stage)
            self.state = TrainState(frozen=self._variables.frozen_hash, started=started)

    def fit(self) -> Classifier | None:
        """Train the remaining phases.

        Returns:
            None; if another run with the same key has completed the stage in the meantime, its result.
        """
        try:
            while self.state.phase < len(self._plan.phases):
                self.fit_phase()
        except CompletedElsewhere as completed:
            log.info("another run has completed the stage", stage=self._plan.stage)
            return completed.result
        return None

    def summarize(self, earlier: Classifier | None) -> TrainingSummary:
        """Summarize the completed stage; `earlier` is the result of the stage before."""
        return TrainingSummary(
            stage=self._plan.stage,
            class_names=self._inputs.data.class_names,
            image_size=self._context.job.spec.dataset.image_size,
            history=[*(earlier.history if earlier else []), *self.state.rows],
            best_epoch=self.state.best_epoch,
            started=self.state.started,
            weights=reporting.report_kept_weights(self.state, self._context, earlier),
        )

    def fit_phase(self) -> None:
        """Train the current phase to its end; the model then has the weights that the plan keeps.

        Raises:
            Stopped: If a stop was requested; the checkpoint is stored.
            DataError: If a loss or a weight becomes NaN or infinite.
        """
        state, model, stage = self.state, self._fit_model, self._plan.stage
        last_epoch = self._plan.last_epoch(state.phase)
        with self._compiled(self._plan.phases[state.phase]), self._checkpoint_on_stop():
            self._evaluate_start()
            while state.epoch < last_epoch and not state.ended:
                # An epoch that was interrupted runs in a separate `fit` call: it has fewer steps left than the others.
                end_epoch = state.epoch + 1 if state.step else last_epoch
                total = (end_epoch - state.epoch) * self.steps_per_epoch - state.step
                with self.workspace.track(stage, total) as tracker:
                    model.make_train_function(force=True)
                    # `fit` calls the existing train function of the model.
                    model.train_function = TrainStep(model.train_function, self, tracker)
                    model.fit(
                        self._batches(),
                        initial_epoch=state.epoch,
                        epochs=end_epoch,
                        steps_per_epoch=self.steps_per_epoch - state.step,
                        callbacks=[self._epoch_callback()],
                        shuffle=False,
                        verbose=0,
                    )
                # With EMA, Keras ends every `fit` by replacing the weights with their averages.
                self._variables.load_latest()
        self._variables.load_best()
        state.start_next_phase()

    @contextmanager
    def _compiled(self, phase: TrainingPhase) -> Iterator[None]:
        """Compile with the layers of a phase unfrozen, and verify afterwards that the frozen ones are unchanged."""
        replicas = self._strategy.num_replicas_in_sync
        with self._strategy.scope():
            # `compile` reads which layers are trainable: unfreezing later has no effect.
            self._unfreeze(phase)
            synchronize_batch_norm(self._model, synchronized=replicas > 1)
            accuracy = make_accuracy()
            self._fit_model.compile(
                optimizer=make_optimizer(
                    phase.optimizer,
                    steps_per_epoch=self.steps_per_epoch,
                    epochs=phase.epochs,
                    replicas=replicas,
                    scale_loss=computes_in_float16(self._fit_model),
                ),
                loss=self._loss,
                metrics=[accuracy],
                jit_compile=jit_compile(replicas),
            )
            self._variables.attach_accuracy(accuracy)
        frozen_hash = hash_variables(frozen_variables(self._model))
        reporting.report_parameters(self._model, self._context)
        try:
            yield
        finally:
            synchronize_batch_norm(self._model, synchronized=False)
        verify_frozen_unchanged(self._model, frozen_hash, self._plan.stage)

    @contextmanager
    def _checkpoint_on_stop(self) -> Iterator[None]:
        try:
            yield
        except StopTraining:
            self._checkpoints.save_now(self.snapshot())
            raise Stopped(
                f"Stopped in epoch {self.state.epoch + 1} of {self._plan.stage} after step {self.state.step}; the "
                "checkpoint is stored. Start the same job again to resume."
            ) from None

    def _batches(self) -> tf.data.Dataset:
        """Create one endless iterator for all epochs: a new one per epoch would wait for tf.data's autotuner."""
        train = self._inputs.data.train
        weights = balanced_class_weights(train.labels, self._classes) if self._plan.balance_classes else None
        batches = training_batches(
            train,
            classes=self._classes,
            batch_size=self.batch_size,
            seed=self._plan.seed,
            first_step=self.state.epoch * self.steps_per_epoch + self.state.step,
            augment=self._inputs.augment,
            class_weights=weights,
        )
        return batches.map(lambda images, one_hot, weight: (images, loss_targets(one_hot), weight))

    def _epoch_callback(self) -> keras.callbacks.Callback:
        return keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda _epoch, _logs: self._variables.restore_running_metrics(mid_epoch=self.state.step > 0),
            on_epoch_end=lambda _epoch, logs: self._end_epoch(logs),
        )

    def _end_epoch(self, logs: dict[str, float]) -> None:
        """Validate, keep the best weights, write the history row, store a checkpoint, and decide whether to stop."""
        state = self.state
        learning_rate = float(keras.ops.convert_to_numpy(self._fit_model.optimizer.learning_rate))
        seconds, input_wait_seconds = state.complete_epoch()
        self._variables.save_latest()
        validation = self._validate()
        row: HistoryRow = {
            "stage": self._plan.stage,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "accuracy": logs["accuracy"],
            **{f"validation_{name}": value for name, value in (validation or {}).items()},
            "learning_rate": learning_rate,
            "seconds": seconds,
            "images_per_second": self.steps_per_epoch * self.batch_size / max(seconds, 1e-9),
            "input_wait_seconds": input_wait_seconds,
        }
        state.rows.append(row)
        reporting.report_epoch(state, self._context, from_cache=self._inputs.from_cache)
        self._save_after_epoch()
        self._fit_model.stop_training = state.ended
        if self.workspace.stop.is_set() and not state.ended and state.epoch < self._plan.epochs:
            raise StopTraining

    def _save_after_epoch(self) -> None:
        """Store a checkpoint, unless the previous one is recent. The last epoch of the stage always stores one."""
        state, checkpoint = self.state, self.snapshot()
        is_last = state.epoch == self._plan.epochs or (state.ended and state.phase == len(self._plan.phases) - 1)
        if is_last or self._checkpoints.is_due_after_epoch:
            self._checkpoints.save(checkpoint)
            if result := read_stage_result(self.workspace.storage, self._plan.stage, self._context.key):
                raise CompletedElsewhere(result)

    def _evaluate_start(self) -> None:
        """Evaluate the result of the stage before as epoch 0: it is kept if no epoch of this stage is better."""
        state = self.state
        is_fresh = not state.epoch and not state.step and state.start is None
        if self._plan.improves_a_classifier and is_fresh and self._validation:
            start = self._validation.evaluate(self._fit_model, self._loss)
            state.record_start(start, self._plan.early_stopping)
            self._variables.save_best()
            reporting.report_start(start, self._context)

    def _validate(self) -> dict[str, float] | None:
        """Evaluate the model, with the moving averages of its weights if it has them, and keep its best weights."""
        averages = moving_averages(self._fit_model.optimizer)
        for variable, average in averages:
            variable.assign(average)
        validation = self._validation.evaluate(self._fit_model, self._loss) if self._validation else None
        if self.state.record_validation(validation, self._plan.early_stopping, self._plan.keep):
            self._variables.save_best()
        if averages:
            self._variables.load_latest()
        return validation

    def checkpoint_is_due(self) -> bool:
        """Return whether to store a checkpoint in the middle of the epoch."""
        return self._checkpoints.is_due

    def save_checkpoint(self) -> None:
        """Store a checkpoint in the background."""
        self._checkpoints.save(self.snapshot())

    def snapshot(self) -> Checkpoint:
        """Copy everything that training changes. Raises DataError if a weight is NaN or infinite."""
        checkpoint = self._variables.snapshot(self.state)
        if not all_finite(checkpoint.values["model"]):
            state = self.state
            epoch, step = (state.epoch + 1, state.step) if state.step else (state.epoch, self.steps_per_epoch)
            raise self.divergence_error(
                f"Weights became NaN or infinite in epoch {epoch} after step {step}", epoch, step
            )
        return checkpoint

    def divergence_error(self, observation: str, epoch: int, step: int) -> DataError:
        """Report diverged training, and return the error to raise. Epoch and step count from 1."""
        number = (epoch - 1) * self.steps_per_epoch + step - 1
        images = batch_image_names(self._inputs.data.train, number, self.batch_size, self._plan.seed)
        self.workspace.metrics.count_non_finite_loss()
        log.error("training diverged", epoch=epoch, step=step, images=", ".join(images))
        return diverged_error(observation, images)

    def _unfreeze(self, phase: TrainingPhase) -> None:
        set_trainable(self._model.get_layer("base"), phase.unfrozen, batch_norm=self._plan.train_batch_norm)
