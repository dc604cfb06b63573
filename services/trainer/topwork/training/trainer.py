"""A stage's epochs: one `fit` of Keras a phase, from wherever the last checkpoint left it."""

from functools import cached_property
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from topwork.data.batches import names_in_batch, training_batches
from topwork.data.local_dataset import LocalDataset
from topwork.errors import DataError, Stopped
from topwork.model.augmentation import Augment
from topwork.model.freezing import (
    audit,
    digest,
    frozen_variables,
    synchronize_batch_norm,
    unfreeze,
)
from topwork.registry.stage_results import Row, tell
from topwork.training.checkpoints import Checkpoint, Checkpoints
from topwork.training.input_stalls import is_held_up, wait_share
from topwork.training.losses import accuracy, balanced_class_weights, loss, targets
from topwork.training.optimizers import averages, optimizer
from topwork.training.plan import Phase, Plan
from topwork.training.steps import Steps, StopAsked, lost
from topwork.training.strategy import jit_compile
from topwork.training.train_state import Course
from topwork.training.validation import Validation
from topwork.training.variables import all_finite, read_values, show_parameters, write_values
from topwork.workspace import Workspace


class Training:
    """A model on its way through the phases of a stage."""

    def __init__(
        self,
        plan: Plan,
        model: keras.Model,
        fitted: keras.Model,
        data: LocalDataset,
        workspace: Workspace,
        checkpoints: Checkpoints,
        augment: Augment | None,
    ) -> None:
        """Take the model as it is at the start of the stage, or as its newest checkpoint left it.

        Args:
            plan: What the stage does.
            model: Classifier with its nested base; built in the scope of the strategy.
            fitted: What runs in `fit` and shares the model's layers: all of it, or its upper half on features.
            data: Training and validation images, or features in their place.
            workspace: Progress, metrics and the sign to stop.
            checkpoints: Where the stage keeps how far it is.
            augment: Changes of the training images.

        Raises:
            DataError: If a checkpoint is of another model.
        """
        self._plan, self._model, self._fitted, self._data = plan, model, fitted, data
        self._workspace, self._checkpoints, self._augment = workspace, checkpoints, augment
        self._strategy = model.distribute_strategy
        self._classes = len(data.class_names)
        self._loss = loss(plan.loss, self._classes)
        self._steps_per_epoch = data.train.size // plan.batch_size
        unfreeze(self._base, plan.phases[-1].unfrozen, batch_norm=plan.batch_norm)
        never_trained = frozen_variables(model)
        kept = {id(variable) for variable in never_trained}
        # Fixed for the whole stage, so that a checkpoint of any phase means the same variables.
        self._moving = [variable for variable in model.variables if id(variable) not in kept]
        self._frozen = digest(never_trained)
        self._best: list[np.ndarray] = []
        self._restored: Checkpoint | None = checkpoints.newest()
        self.course = self._restored.course if self._restored else self._begun()
        self._take_up()

    def _begun(self) -> Course:
        return Course(frozen=self._frozen, started=self._workspace.metrics.stage_started(self._plan.stage))

    @property
    def _base(self) -> keras.Model:
        return self._model.get_layer("base")

    @cached_property
    def _validation(self) -> Validation | None:
        if self._data.validation is None or not self._data.validation.size:
            return None
        rule = self._plan.early_stopping
        return Validation(
            self._data.validation,
            classes=self._classes,
            batch_size=self._plan.batch_size,
            auc=rule is not None and rule.monitor == "auc",
        )

    def _take_up(self) -> None:
        if self._restored is None:
            return
        if self.course.frozen != self._frozen:
            raise DataError(
                f"The base isn't the one that this {self._plan.stage} stage was begun with, so its checkpoint can't be "
                "used. Start over with --restart."
            )
        write_values(self._moving, self._restored.values["model"])
        self._best = self._restored.values.get("best", [])
        tell(self.course.rows, self.course.best_epoch, self._workspace.metrics)
        self._workspace.metrics.resumed(self._plan.stage, self.course.started)
        self._workspace.progress.note("resumed", stage=self._plan.stage, epoch=self.course.epoch, step=self.course.step)

    def run(self) -> None:
        """Train the phases that are left; the model ends with its best weights.

        Raises:
            Stopped: If asked to; the checkpoint is stored.
            DataError: If a loss or a weight is no longer finite.
        """
        self._workspace.metrics.epochs_planned(self._plan.stage, self._plan.epochs)
        while self.course.phase < len(self._plan.phases):
            self._run_phase(self._plan.phases[self.course.phase])
            write_values(self._moving, self._best)
            self.course.next_phase()
            self._restored = None

    def _run_phase(self, phase: Phase) -> None:
        self._compile(phase)
        before = digest(frozen_variables(self._model))
        show_parameters(self._model, self._plan.stage, self._workspace)
        end = self._plan.end_of(self.course.phase)
        try:
            while self.course.epoch < end and not self.course.ended:
                self._fit(end)
        except StopAsked:
            self._checkpoints.save_now(self.snapshot())
            raise Stopped(
                f"Stopped in epoch {self.course.epoch + 1} of {self._plan.stage} after step {self.course.step}; the "
                "checkpoint is stored. Start the same job again to go on."
            ) from None
        finally:
            synchronize_batch_norm(self._model, synchronized=False)
        audit(self._model, before, self._plan.stage)

    def _compile(self, phase: Phase) -> None:
        """Compile with what is trained now; a change of `trainable` counts from here on."""
        replicas = self._strategy.num_replicas_in_sync
        with self._strategy.scope():
            unfreeze(self._base, phase.unfrozen, batch_norm=self._plan.batch_norm)
            synchronize_batch_norm(self._model, synchronized=replicas > 1)
            self._accuracy = accuracy()
            self._fitted.compile(
                optimizer=optimizer(phase.optimizer, steps_per_epoch=self._steps_per_epoch, epochs=phase.epochs),
                loss=self._loss,
                metrics=[self._accuracy],
                jit_compile=jit_compile(replicas),
            )
            made = self._fitted.optimizer
            made.build(self._fitted.trainable_variables)
            if self._restored is not None:
                write_values(made.variables, self._restored.values["optimizer"])

    def _fit(self, end: int) -> None:
        """Run `fit` to the end of the phase, or of the epoch that a stop has cut in two."""
        course = self.course
        begun = course.step
        steps = self._steps()
        last = course.epoch + 1 if begun else end
        total = (last - course.epoch) * self._steps_per_epoch - begun
        with self._workspace.track(self._plan.stage, total) as steps.tracker:
            self._fitted.fit(
                self._batches(),
                initial_epoch=course.epoch,
                epochs=last,
                steps_per_epoch=self._steps_per_epoch - begun,
                callbacks=[_Epochs(self)],
                shuffle=False,
                verbose=0,
            )
        # With an average of the weights Keras ends each fit by putting it in their place.
        write_values(self._moving, self._last_values)

    def _steps(self) -> Steps:
        self._fitted.make_train_function(force=True)
        steps = Steps(
            self._fitted.train_function,
            self,
            self._workspace,
            steps_per_epoch=self._steps_per_epoch,
            batch_size=self._plan.batch_size,
        )
        # `fit` makes no other where there is one.
        self._fitted.train_function = steps
        return steps

    def _batches(self) -> tf.data.Dataset:
        """One endless iterator for the whole phase: a new one each epoch would wait for tf.data's autotuner."""
        weights = balanced_class_weights(self._data.train.labels, self._classes) if self._plan.balanced else None
        batches = training_batches(
            self._data.train,
            classes=self._classes,
            batch_size=self._plan.batch_size,
            seed=self._plan.seed,
            first_step=self.course.epoch * self._steps_per_epoch + self.course.step,
            augment=self._augment,
            class_weights=weights,
        )
        return batches.map(lambda images, one_hot, weight: (images, targets(one_hot), weight))

    def begin_epoch(self) -> None:
        """Take up the running means of an epoch that was begun before a stop."""
        if self._restored is not None and self.course.step:
            write_values(self._running_means, self._restored.values["metrics"])
        self._restored = None

    def end_epoch(self, logs: dict[str, float]) -> None:
        """Measure, keep what is best, write the row, store a checkpoint, and see whether to go on."""
        course = self.course
        rate = float(keras.ops.convert_to_numpy(self._fitted.optimizer.learning_rate))
        seconds, waited = course.epoch_seconds, course.epoch_wait_seconds
        course.epoch, course.step, course.epoch_seconds, course.epoch_wait_seconds = course.epoch + 1, 0, 0.0, 0.0
        self._last_values = read_values(self._moving)
        measured = self._judge()
        row: Row = {
            "stage": self._plan.stage,
            "epoch": course.epoch,
            "loss": logs["loss"],
            "accuracy": logs["accuracy"],
        }
        row |= {f"validation_{name}": value for name, value in (measured or {}).items()}
        images = self._steps_per_epoch * self._plan.batch_size
        row |= {"learning_rate": rate, "seconds": seconds, "images_per_second": images / max(seconds, 1e-9)}
        row |= {"input_wait_seconds": waited}
        course.rows.append(row)
        self._tell(row)
        self._checkpoints.save(self.snapshot())
        self._fitted.stop_training = course.ended
        if self._workspace.stop.is_set() and not course.ended and course.epoch < self._plan.epochs:
            raise StopAsked

    def _judge(self) -> dict[str, float] | None:
        """Measure the model with its averages, where it has them, and keep its values if they're the best."""
        pairs = averages(self._fitted.optimizer)
        for variable, average in pairs:
            variable.assign(average)
        measured = self._validation.measure(self._fitted, self._loss) if self._validation else None
        if self.course.judge(measured, self._plan.early_stopping):
            self._best = read_values(self._moving)
        if pairs:
            write_values(self._moving, self._last_values)
        return measured

    @property
    def _running_means(self) -> list[Any]:
        means = [metric for metric in self._fitted.metrics if metric.name == "loss"]
        return [variable for metric in (*means, self._accuracy) for variable in metric.variables]

    def snapshot(self) -> Checkpoint:
        """Copy everything that training changes."""
        values = {
            "model": read_values(self._moving),
            "optimizer": read_values(self._fitted.optimizer.variables),
            "best": self._best,
        }
        if self.course.step:
            values["metrics"] = read_values(self._running_means)
        if not all_finite(values["model"]):
            raise self._lost_weights()
        return Checkpoint(self.course.model_copy(deep=True), values)

    def is_due(self) -> bool:
        """Whether a checkpoint is to be stored in the middle of this epoch."""
        return self._checkpoints.is_due

    def save(self) -> None:
        """Store a checkpoint beside training."""
        self._checkpoints.save(self.snapshot())

    def names(self, step: int) -> list[str]:
        """Give the origins of the images of a step of the epoch that runs, counted from 1."""
        number = self.course.epoch * self._steps_per_epoch + step - 1
        return names_in_batch(self._data.train, number, self._plan.batch_size, self._plan.seed)

    def _lost_weights(self) -> DataError:
        self._workspace.metrics.loss_not_finite()
        course = self.course
        epoch, step = (course.epoch + 1, course.step) if course.step else (course.epoch, self._steps_per_epoch)
        names = self.names(step - self._steps_per_epoch * (not course.step))
        return lost(f"Weights are no numbers any more in epoch {epoch} after step {step}", names)

    def _tell(self, row: Row) -> None:
        tell(self.course.rows, self.course.best_epoch, self._workspace.metrics)
        facts = {name: value for name, value in row.items() if name not in {"stage", "epoch"}}
        self._workspace.progress.epoch(self._plan.stage, self.course.epoch, self._plan.epochs, **facts)
        if is_held_up(row):
            told = {"stage": self._plan.stage, "epoch": self.course.epoch, "waited": f"{wait_share([row]):.0%}"}
            self._workspace.progress.note("input holds up training", **told, remedies=self._plan.remedies)


class _Epochs(keras.callbacks.Callback):
    """Hands the ends of Keras' epochs to the training."""

    def __init__(self, training: Training) -> None:
        super().__init__()
        self._training = training

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._training.begin_epoch()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._training.end_epoch(logs or {})
