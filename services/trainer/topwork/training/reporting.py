"""Log events, metrics and followers of training: trainable parameters, completed epochs, and input-bound warnings."""

import keras
import structlog

from topwork.model.freezing import count_parameters
from topwork.progress import StageProgress
from topwork.registry.kept_weights import KeptWeights
from topwork.registry.stage_results import Classifier, report_metrics
from topwork.training.checkpointing.train_state import TrainState
from topwork.training.input_stalls import input_bound_advice, input_wait_share, is_input_bound
from topwork.training.plan import StageContext

log = structlog.get_logger(__name__)


def report_parameters(model: keras.Model, context: StageContext) -> None:
    """Report how many parameters of each layer group are trainable and frozen.

    Args:
        model: The classifier.
        context: The stage.
    """
    groups = count_parameters(model)
    for group in groups:
        log.info(
            "parameters",
            stage=context.plan.stage,
            layers=group.name,
            trainable=group.trainable,
            frozen=group.frozen,
        )
    trainable, frozen = sum(group.trainable for group in groups), sum(group.frozen for group in groups)
    context.workspace.metrics.set_parameters(trainable, frozen)


def report_epoch(state: TrainState, context: StageContext, *, from_cache: bool) -> None:
    """Report the epoch that just completed, and warn if it was input-bound.

    Args:
        state: State of the stage; its last row is the epoch.
        context: The stage.
        from_cache: Whether the input is cached features.
    """
    plan, row = context.plan, state.rows[-1]
    report_metrics(state.rows, state.best_epoch, context.workspace.metrics)
    _report_to_followers(state, context)
    values = {name: value for name, value in row.items() if name not in {"stage", "epoch"}}
    log.info("epoch", stage=plan.stage, epoch=state.epoch, epochs=plan.epochs, **values)
    if is_input_bound(row):
        log.warning(
            "training is input-bound",
            stage=plan.stage,
            epoch=state.epoch,
            waited=f"{input_wait_share([row]):.0%}",
            advice=input_bound_advice(context.job.spec, plan.stage, plan.phases[-1].unfrozen, from_cache=from_cache),
        )


def report_resume(state: TrainState, context: StageContext) -> None:
    """Report that a stage continues from a checkpoint, and report its earlier epochs again.

    Args:
        state: State of the stage in the checkpoint.
        context: The stage.
    """
    stage, metrics = context.plan.stage, context.workspace.metrics
    report_metrics(state.rows, state.best_epoch, metrics)
    _report_to_followers(state, context)
    if state.start and not state.best_epoch:
        metrics.set_best_metric(stage, "accuracy", "validation", state.start["accuracy"])
    metrics.set_stage_start(stage, state.started)
    log.info("resumed", stage=stage, epoch=state.epoch, step=state.step)


def _report_to_followers(state: TrainState, context: StageContext) -> None:
    progress = StageProgress(context.plan.stage, state.started, tuple(dict(row) for row in state.rows))
    context.workspace.followers.report(context.job, progress)


def report_start(start: dict[str, float], context: StageContext) -> None:
    """Report the metrics that the epochs of a stage have to improve.

    Args:
        start: Metrics on the validation split before the first epoch.
        context: The stage.
    """
    stage = context.plan.stage
    values = {f"validation_{name}": value for name, value in start.items()}
    log.info("start", stage=stage, epoch=0, monitor=f"validation_{context.plan.monitor}", **values)
    context.workspace.metrics.set_best_metric(stage, "accuracy", "validation", start["accuracy"])


def report_kept_weights(state: TrainState, context: StageContext, earlier: Classifier | None) -> KeptWeights:
    """Report which weights a completed stage keeps, with a warning if fine-tuning did not improve the model.

    Args:
        state: State of the stage after its last epoch.
        context: The stage.
        earlier: Result of the stage before.

    Returns:
        Stage and epoch that the weights come from.
    """
    plan, kept = context.plan, _kept_weights(state, context, earlier)
    log.info("kept weights", stage=plan.stage, weights=kept.description)
    if kept.note:
        log.warning("fine-tuning did not improve the model", stage=plan.stage, reason=kept.note)
    return kept


def _kept_weights(state: TrainState, context: StageContext, earlier: Classifier | None) -> KeptWeights:
    plan = context.plan
    values = {
        name: float(value)
        for row in state.rows
        for name, value in row.items()
        if row["epoch"] == state.best_epoch and name.startswith("validation_")
    }
    metrics = {name.removeprefix("validation_"): value for name, value in values.items()}
    monitor = plan.monitor if metrics or state.start else None
    source = earlier.kept if earlier and not state.best_epoch else None
    return KeptWeights(
        stage=source.stage if source else plan.stage,
        epoch=source.epoch if source else state.best_epoch,
        keep=plan.keep if monitor else "last",
        monitor=monitor,
        fine_tuned=plan.stage == "fine-tune",
        start=state.start or {},
        kept=metrics,
    )
