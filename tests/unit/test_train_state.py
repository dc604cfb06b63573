"""Which epoch a stage keeps, and when early stopping ends it."""

import pytest

from topwork.registry.kept_weights import KeptWeights
from topwork.spec.training import EarlyStopping
from topwork.training.checkpointing.train_state import TrainState

ACCURACY = EarlyStopping(monitor="accuracy", patience=2)


def kept_epochs(values, *, start=None, early_stopping=None, keep="best"):
    """Record the metric of each epoch; return the kept epoch after each of them, up to the end of the stage."""
    monitor = early_stopping.monitor if early_stopping else "loss"
    state = TrainState()
    if start is not None:
        state.record_start({monitor: start}, early_stopping)
    kept = [state.best_epoch] if start is not None else []
    for value in values:
        state.complete_epoch()
        saved = state.record_validation(None if value is None else {monitor: value}, early_stopping, keep)
        assert saved == (state.best_epoch == state.epoch)
        kept.append(state.best_epoch)
        if state.ended:
            break
    # A resumed stage continues with the state of its checkpoint.
    assert TrainState.model_validate_json(state.model_dump_json()) == state
    return kept


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([0.5, 0.4, 0.6], {}, [1, 2, 2]),
        ([0.5, 0.4, 0.6], {"start": 0.3}, [0, 0, 0, 0]),
        ([0.5, 0.2, 0.6], {"start": 0.3}, [0, 0, 2, 2]),
        # An epoch must be better than the start, not equal.
        ([0.3, 0.3], {"start": 0.3}, [0, 0, 0]),
        ([0.5, 0.4, 0.6], {"start": 0.3, "keep": "last"}, [0, 1, 2, 3]),
        # Higher is better for accuracy; the start counts for the patience, too.
        ([0.9, 0.8, 0.95, 1.0], {"start": 1.0, "early_stopping": ACCURACY}, [0, 0, 0]),
        ([0.9, 0.8, 0.7, 0.6], {"early_stopping": ACCURACY}, [1, 1, 1]),
        ([0.9, 0.8, 0.7, 0.6], {"early_stopping": ACCURACY, "keep": "last"}, [1, 2, 3]),
        ([0.8, 0.9, 0.7, 0.6], {"start": 0.85, "early_stopping": ACCURACY}, [0, 0, 2, 2, 2]),
        ([0.29, 0.1], {"start": 0.3, "early_stopping": EarlyStopping(min_delta=0.05)}, [0, 0, 2]),
        # Without a validation split, the last epoch is kept.
        ([None, None], {}, [1, 2]),
    ],
)
def test_kept_epoch(values, options, expected):
    assert kept_epochs(values, **options) == expected


def test_lower_loss_with_a_lower_accuracy_than_at_the_start_is_no_improvement():
    def kept(early_stopping, epochs):
        state = TrainState()
        state.record_start({"loss": 9.6, "accuracy": 0.9, "auc": 0.9}, early_stopping)
        for loss, accuracy, auc in epochs:
            state.complete_epoch()
            state.record_validation({"loss": loss, "accuracy": accuracy, "auc": auc}, early_stopping)
        return state.best_epoch

    # The accuracy collapses, although the loss of the overconfident start is much higher.
    assert kept(None, [(1.4, 0.4, 0.5), (1.1, 0.8, 0.95)]) == 0
    assert kept(None, [(1.4, 0.4, 0.5), (1.1, 0.9, 0.5), (1.0, 0.8, 0.95)]) == 2
    # The spec decides if it names another metric.
    assert kept(EarlyStopping(monitor="auc", patience=9), [(1.4, 0.4, 0.5), (1.1, 0.8, 0.95)]) == 2


def test_note_says_what_fine_tuning_did_not_improve():
    kept = KeptWeights(
        stage="fine-tune", epoch=2, monitor="loss", fine_tuned=True,
        start={"loss": 0.5, "accuracy": 1.0}, kept={"loss": 0.4, "accuracy": 0.78},
    )  # fmt: skip
    assert kept.note == (
        "Fine-tuning improved the validation loss but not every metric: accuracy from 1.0000 to 0.7800. The metric "
        "that decides is spec.fineTune.earlyStopping.monitor."
    )
    assert kept.description == "fine-tune, epoch 2 (the best by validation loss)"
    assert kept.model_copy(update={"kept": {"loss": 0.4, "accuracy": 1.0}}).note == ""


def test_description_without_a_validation_split():
    kept = KeptWeights(stage="fine-tune", epoch=3, keep="last", fine_tuned=True)
    assert kept.note == ""
    assert kept.description == ("fine-tune, epoch 3 (the last one: there is no validation split to compare epochs)")
    assert KeptWeights(stage="fine-tune", epoch=3, keep="last", monitor="loss").description == (
        "fine-tune, epoch 3 (the last one)"
    )
