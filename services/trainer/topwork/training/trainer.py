"""Training of one stage, from top to bottom: `train` runs the stage, `Trainer` its epochs, `TrainStep` one step.

The stages `transfer` and `fine_tune` call `train` with their plan. Each step is Keras' own `train_step`. The loop
around it replaces `fit`, which does not work with several nodes, and adds what a preemptible job needs: checkpoints
within an epoch, an exact resume, early stopping whose best weights survive a restart, and the check that frozen weights
did not change.

With several nodes, every node runs this code. Their weights are the same after every step. Node 0, the chief, stores
checkpoints and the result, and decides whatever depends on time or storage.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import keras
import structlog
import tensorflow as tf

from topwork.data.batches import Shard, batch_image_names, training_batches
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.local_dataset import fetch_dataset
from topwork.errors import DataError, Stopped, UnavailableError
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
    delete_attempt,
    read_stage_result,
    store_stage_result,
)
from topwork.training import reporting
from topwork.training.checkpointing.checkpoints import Checkpoint, Checkpoints
from topwork.training.checkpointing.continuation import TrainingInput, find_kept_checkpoint, keep_checkpoint
from topwork.training.checkpointing.train_state import TrainState
from topwork.training.checkpointing.variables import StageVariables, all_finite
from topwork.training.distribution.lost_nodes import report_lost_nodes
from topwork.training.distribution.replicas import distribute_endless_batches
from topwork.training.distribution.strategy import get_strategy, jit_compile
from topwork.training.divergence import diverged_error
from topwork.training.feature_cache.features import delete_features
from topwork.training.inputs import TrainingInputs, prepare_inputs, prepare_model
from topwork.training.losses import balanced_class_weights, loss_targets, make_accuracy, make_loss
from topwork.training.memory_allocation import keep_freed_memory
from topwork.training.optimizers import make_optimizer, moving_averages
from topwork.training.plan import StageContext, TrainingPhase
from topwork.training.preflight import check_data, check_metrics, check_replicas
from topwork.training.train_step import StopTraining, TrainStep, make_step_function
from topwork.training.validation import Validation, create_validation

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
    nodes, storage, plan = context.workspace.nodes, context.workspace.storage, context.plan
    try:
        with report_lost_nodes(nodes):
            return _train(context, dataset, build_model, earlier)
    except (UnavailableError, Stopped):
        # A node may leave as soon as the stage is complete, before the others have heard of it.
        is_interrupted = nodes.count == 1 or context.workspace.stop.is_set()
        if is_interrupted or (completed := read_stage_result(storage, plan.stage, context.key)) is None:
            raise
        log.info("stage already complete", stage=plan.stage, node=nodes.index)
        if nodes.is_chief:
            delete_attempt(context.job.run, plan.stage, context.key, storage)
        return completed


def _train(
    context: StageContext,
    dataset: StoredDataset,
    build_model: Callable[[], keras.Model],
    earlier: Classifier | None,
) -> Classifier:
    job, plan, workspace = context.job, context.plan, context.workspace
    nodes = workspace.nodes
    strategy = get_strategy(workspace.replicas, nodes)
    keep_freed_memory()
    for phase in plan.phases:
        check_replicas(strategy.num_replicas_in_sync, plan.batch_size, phase.optimizer)
    data = fetch_dataset(dataset, job, workspace)
    check_metrics(job, data)
    check_data(job, plan, data)
    nodes.require_equal(f"The key of {plan.stage}", context.key)
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
        if (classifier := trainer.fit()) is None:
            classifier = trainer.store_result(earlier)
        if nodes.is_chief:
            checkpoints.clear()
            delete_features(context)
    return classifier


class Trainer:
    """Trains the phases of a stage, and resumes where the newest checkpoint was stored."""

    def __init__(
        self, context: StageContext, model: keras.Model, inputs: TrainingInputs, checkpoints: Checkpoints
    ) -> None:
        """Initialize the trainer, and restore the newest checkpoint if there is one.

        Args:
            context: Job, plan and workspace of the stage.
            model: Classifier with its nested base, built in the scope of the strategy.
            inputs: The model that is trained, and its data.
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
        self._nodes = self.workspace.nodes
        self._validation = create_validation(inputs.data, self._plan, self._nodes)
        self.batch_size = self._plan.batch_size
        self.steps_per_epoch = inputs.data.train.size // self.batch_size
        self._unfreeze(self._plan.phases[-1])
        self._variables = StageVariables(model, self._fit_model, self._nodes)
        self._last: Checkpoint | None = None
        started = self.workspace.metrics.stage_start_time(self._plan.stage)
        if (checkpoint := checkpoints.newest()) is not None:
            self._restore(checkpoint)
        elif (checkpoint := find_kept_checkpoint(context, self._training_input)) is not None:
            self._restore(replace(checkpoint, state=checkpoint.state.model_copy(update={"started": started})))
        else:
            self.state = TrainState(frozen=self._variables.frozen_hash, started=started)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self._variables.restore(checkpoint)
        self.state = checkpoint.state
        self._keep_if_last(checkpoint)
        reporting.report_resume(self.state, self._context)

    def _keep_if_last(self, checkpoint: Checkpoint) -> None:
        """Remember a checkpoint after the last epoch of the stage, if it has to be kept."""
        if self._context.job.spec.compute.keep_checkpoint and self._is_last_epoch():
            self._last = replace(checkpoint, state=checkpoint.state.model_copy(deep=True))

    def _is_last_epoch(self) -> bool:
        state = self.state
        return state.epoch == self._plan.epochs or (state.ended and state.phase == len(self._plan.phases) - 1)

    @property
    def _training_input(self) -> TrainingInput:
        views = self._inputs.data.train.views if self._inputs.from_cache else 0
        return TrainingInput(
            views=views,
            precision=self._inputs.precision,
            libraries=f"TensorFlow {tf.__version__} and Keras {keras.__version__}",
            frozen=self._variables.frozen_hash,
        )

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

    def store_result(self, earlier: Classifier | None) -> Classifier:
        """Store the completed stage on the chief, and return the result on all nodes.

        Args:
            earlier: Result of the stage before.
        """
        if self._nodes.is_chief:
            if self._last:
                keep_checkpoint(self._context, self._last, self._training_input)
            summary = self._summarize(earlier)
            result = store_stage_result(
                self._model,
                summary,
                self._context.key,
                self.workspace,
                keep_in_memory=not self._context.job.spec.publish.enabled,
            )
        self._nodes.broadcast(None)
        return result if self._nodes.is_chief else self._read_result()

    def _read_result(self) -> Classifier:
        """Read the result of the stage, which the chief or another run has stored."""
        stage, key = self._plan.stage, self._context.key
        if (result := read_stage_result(self.workspace.storage, stage, key)) is None:
            raise UnavailableError(
                f"The result of {stage} disappeared from {self.workspace.storage.uri} right after it was stored. Start "
                "the same job again."
            )
        return result

    def _summarize(self, earlier: Classifier | None) -> TrainingSummary:
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
        state = self.state
        last_epoch = self._plan.last_epoch(state.phase)
        total = (last_epoch - state.epoch) * self.steps_per_epoch - state.step
        with self._compiled(self._plan.phases[state.phase]), self._checkpoint_on_stop():
            self._evaluate_start()
            batches = iter(self._batches())
            with self.workspace.track(self._plan.stage, total) as tracker:
                step = TrainStep(make_step_function(self._fit_model), self, tracker)
                while state.epoch < last_epoch and not state.ended:
                    self._train_epoch(step, batches)
        self._require_equal_weights()
        self._variables.load_best()
        state.start_next_phase()

    def _train_epoch(self, step: TrainStep, batches: Iterator[Any]) -> None:
        """Train an epoch, or the rest of an epoch that was interrupted."""
        self._fit_model.reset_metrics()
        self._variables.restore_running_metrics(mid_epoch=self.state.step > 0)
        while self.state.step < self.steps_per_epoch:
            step(batches)
        means = self._fit_model.get_metrics_result()
        self._end_epoch({name: float(mean) for name, mean in means.items()})

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

    def _batches(self) -> Iterable[Any]:
        """Return the batches of all epochs: a new iterator for each epoch would wait for tf.data's autotuner."""
        train = self._inputs.data.train
        weights = balanced_class_weights(train.labels, self._classes) if self._plan.balance_classes else None
        batches = training_batches(
            train,
            classes=self._classes,
            batch_size=self.batch_size,
            shard=Shard(self._nodes.index, self._nodes.count),
            seed=self._plan.seed,
            first_step=self.state.epoch * self.steps_per_epoch + self.state.step,
            augment=self._inputs.augment,
            class_weights=weights,
        )
        targets = batches.map(lambda images, one_hot, weight: (images, loss_targets(one_hot), weight))
        return distribute_endless_batches(targets, self._strategy)

    def _end_epoch(self, logs: dict[str, float]) -> None:
        """Validate, keep the best weights, write the history row, store a checkpoint, and decide whether to stop."""
        state = self.state
        learning_rate = float(keras.ops.convert_to_numpy(self._fit_model.optimizer.learning_rate))
        seconds, input_wait_seconds = state.complete_epoch()
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
        is_stopping = self._nodes.any(self.workspace.stop.is_set())
        if is_stopping and not state.ended and state.epoch < self._plan.epochs:
            raise StopTraining

    def _save_after_epoch(self) -> None:
        """Store a checkpoint, unless the previous one is recent. The last epoch of the stage always stores one."""
        checkpoint = self.snapshot()
        if self._is_last_epoch() or self._nodes.broadcast(self._checkpoints.is_due_after_epoch):
            self._checkpoints.save(checkpoint)
            self._keep_if_last(checkpoint)
            stage, key = self._plan.stage, self._context.key
            is_complete = self._nodes.is_chief and read_stage_result(self.workspace.storage, stage, key) is not None
            if self._nodes.broadcast(is_complete):
                raise CompletedElsewhere(self._read_result())

    def _evaluate_start(self) -> None:
        """Evaluate the result of the stage before as epoch 0: it is kept if no epoch of this stage is better."""
        state = self.state
        is_fresh = not state.epoch and not state.step and state.start is None
        if self._plan.improves_a_classifier and is_fresh and self._validation:
            start = self._evaluate(self._validation)
            state.record_start(start, self._plan.early_stopping)
            self._variables.save_best()
            reporting.report_start(start, self._context)

    def _validate(self) -> dict[str, float] | None:
        """Evaluate the model, with the moving averages of its weights if it has them, and keep its best weights."""
        averages = moving_averages(self._fit_model.optimizer)
        if averages:
            self._variables.save_latest()
        for variable, average in averages:
            variable.assign(average)
        validation = self._evaluate(self._validation) if self._validation else None
        if self.state.record_validation(validation, self._plan.early_stopping, self._plan.keep):
            self._variables.save_best()
        if averages:
            self._variables.load_latest()
        return validation

    def _evaluate(self, validation: Validation) -> dict[str, float]:
        metrics = validation.evaluate(self._fit_model, self._loss)
        self.workspace.metrics.record_evaluation_speed(validation.evaluated_images, validation.seconds)
        return metrics

    def _require_equal_weights(self) -> None:
        """Require that all nodes have the same weights, which is a cheap check of all communication in the phase."""
        if self._nodes.count > 1:
            self._nodes.require_equal(f"The result of {self._plan.stage}", self._variables.hash_all())

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
