"""When input holds training up, and what is said about it."""

import pytest

from topwork.spec import TransferJob
from topwork.training.input_stalls import InputStalls, input_bound_advice, input_wait_share, is_input_bound


def held(steps: list[tuple[float, float]], last: float) -> tuple[float, float]:
    """Account for steps, each asked for and started at a second, of which the device had done the last one then."""
    holdups = InputStalls()
    for asked, start in steps:
        holdups.add_step(asked, start)
    return holdups.settle(last)


def test_on_a_processor_every_wait_counts():
    # Waits of 2, 3 and 2 s, each before a step of 1 s.
    waited, computed = held([(0, 2), (3, 6), (7, 9)], 10)
    assert (waited, computed) == (pytest.approx(7), pytest.approx(3))


def test_a_gpu_that_is_busy_while_the_host_waits_is_not_held_up():
    # Steps of 10 s on the GPU; a batch takes 6 s, and the host, which computes nothing, waits for each.
    waited, computed = held([(0, 6), (6, 12), (12, 18), (18, 24)], 46)
    assert waited == pytest.approx(6)  # for the first batch alone
    assert computed == pytest.approx(40)


def test_a_gpu_that_is_faster_than_its_input_is_held_up():
    # Steps of 2 s on the GPU; a batch takes 6 s.
    waited, computed = held([(0, 6), (6, 12), (12, 18), (18, 24)], 26)
    assert (waited, computed) == (pytest.approx(18), pytest.approx(8))


def test_time_that_nobody_waited_for_input_is_computing():
    # Steps of 1, 5 and 1 s, without a wait: the device was slow, not the input.
    assert held([(0, 0), (1, 1), (6, 6)], 7) == (0, 7)


def test_steps_are_accounted_for_once():
    holdups = InputStalls()
    holdups.add_step(0, 1)
    assert holdups.settle(2) == (1, 1)
    holdups.add_step(10, 10)
    assert holdups.settle(11) == (0, 1)


@pytest.mark.parametrize(
    ("waited", "seconds", "says"),
    [(34.0, 100.0, True), (33.0, 100.0, False), (0.9, 1.0, False), (1.0, 2.0, True), (None, 100.0, False)],
)
def test_input_holds_up_an_epoch_over_a_third_of_its_time(waited, seconds, says):
    row = {"stage": "transfer", "seconds": seconds} | ({} if waited is None else {"input_wait_seconds": waited})
    assert is_input_bound(row) is says


def test_the_share_of_a_stage_is_that_of_all_its_epochs():
    rows = [{"seconds": 30.0, "input_wait_seconds": 15.0}, {"seconds": 10.0, "input_wait_seconds": 5.0}]
    assert input_wait_share(rows) == 0.5
    assert input_wait_share([]) == 0.0


def spec(**parts: object):
    kept = {
        "storage": "s3://bucket/prefix",
        "dataset": {
            "source": {"tfds": "cats_vs_dogs"},
            "splits": {"train": "train[:80%]", "test": "train[80%:]"},
            "imageSize": [96, 96],
        },
        "model": {"base": {"application": "Xception"}},
        "compute": {"cpu": 4},
    }
    content = {"apiVersion": "topwork.dev/v1alpha1", "kind": "TransferJob", "metadata": {"name": "cats"}}
    return TransferJob.model_validate(content | {"spec": kept | parts}).spec


def test_the_remedies_go_by_what_the_job_says():
    cores = "raise spec.compute.cpu above 4, or use a machine with more cores"
    assert input_bound_advice(spec(), "transfer", "none", from_cache=False) == cores
    slow = spec(
        augmentation={"flip": "horizontal", "rotation": 0.1, "randAugment": {}}, transfer={"featureCache": "off"}
    )
    assert input_bound_advice(slow, "transfer", "none", from_cache=False) == (
        "set spec.transfer.featureCache: on to read images once per view instead of once per epoch; "
        f"remove rotation and randAugment from spec.augmentation; {cores}"
    )
    # What is mixed anew at each step can't be kept, and neither can what a base gives that is trained.
    mixed = spec(augmentation={"mixUp": 0.2}, transfer={"featureCache": "off"})
    assert input_bound_advice(mixed, "transfer", "none", from_cache=False).startswith(
        "remove mixUp from spec.augmentation"
    )
    whole = spec(fineTune={"epochs": 2, "unfreeze": "all", "featureCache": "off"})
    assert input_bound_advice(whole, "fine-tune", "all", from_cache=False) == cores
    assert input_bound_advice(slow, "transfer", "none", from_cache=True) == (
        f"{cores}; raise spec.compute.memory so that features are not read from scratch"
    )
