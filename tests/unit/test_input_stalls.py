"""Measuring input stalls, and the advice for input-bound training."""

import pytest

from topwork.spec import TransferJob
from topwork.training.input_stalls import InputStalls, input_bound_advice, input_wait_share, is_input_bound


def measure(steps: list[tuple[float, float]], last: float) -> tuple[float, float]:
    """Measure steps from the times of their batch request and start; the device finishes the last step at `last`."""
    stalls = InputStalls()
    for requested, start in steps:
        stalls.add_step(requested, start)
    return stalls.take_totals(last)


def test_every_wait_counts_on_a_cpu():
    # Waits of 2, 3 and 2 s, each before a step of 1 s.
    waited, computed = measure([(0, 2), (3, 6), (7, 9)], 10)
    assert (waited, computed) == (pytest.approx(7), pytest.approx(3))


def test_waits_do_not_count_while_the_gpu_is_busy():
    # Steps of 10 s on the GPU; a batch takes 6 s, and the idle host waits for each.
    waited, computed = measure([(0, 6), (6, 12), (12, 18), (18, 24)], 46)
    assert waited == pytest.approx(6)  # only for the first batch
    assert computed == pytest.approx(40)


def test_waits_count_if_the_gpu_is_faster_than_the_input():
    # Steps of 2 s on the GPU; a batch takes 6 s.
    waited, computed = measure([(0, 6), (6, 12), (12, 18), (18, 24)], 26)
    assert (waited, computed) == (pytest.approx(18), pytest.approx(8))


def test_time_without_waiting_counts_as_computing():
    # Steps of 1, 5 and 1 s, without a wait: the device was slow, not the input.
    assert measure([(0, 0), (1, 1), (6, 6)], 7) == (0, 7)


def test_each_step_is_counted_once():
    stalls = InputStalls()
    stalls.add_step(0, 1)
    assert stalls.take_totals(2) == (1, 1)
    stalls.add_step(10, 10)
    assert stalls.take_totals(11) == (0, 1)


@pytest.mark.parametrize(
    ("waited", "seconds", "expected"),
    [(34.0, 100.0, True), (33.0, 100.0, False), (0.9, 1.0, False), (1.0, 2.0, True), (None, 100.0, False)],
)
def test_epoch_is_input_bound_if_it_waits_more_than_a_third_of_its_time(waited, seconds, expected):
    row = {"stage": "transfer", "seconds": seconds} | ({} if waited is None else {"input_wait_seconds": waited})
    assert is_input_bound(row) is expected


def test_wait_share_of_a_stage_covers_all_epochs():
    rows = [{"seconds": 30.0, "input_wait_seconds": 15.0}, {"seconds": 10.0, "input_wait_seconds": 5.0}]
    assert input_wait_share(rows) == 0.5
    assert input_wait_share([]) == 0.0


def spec(**parts: object):
    defaults = {
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
    return TransferJob.model_validate(content | {"spec": defaults | parts}).spec


def test_advice_depends_on_the_job():
    cores = "raise spec.compute.cpu above 4, or use a machine with more cores"
    assert input_bound_advice(spec(), "transfer", "none", from_cache=False) == cores
    slow = spec(
        augmentation={"flip": "horizontal", "rotation": 0.1, "randAugment": {}}, transfer={"featureCache": "off"}
    )
    assert input_bound_advice(slow, "transfer", "none", from_cache=False) == (
        "set spec.transfer.featureCache: on to read images once per view instead of once per epoch; "
        f"remove rotation and randAugment from spec.augmentation; {cores}"
    )
    # Images mixed at every step cannot be cached, and neither can the output of a trained base.
    mixed = spec(augmentation={"mixUp": 0.2}, transfer={"featureCache": "off"})
    assert input_bound_advice(mixed, "transfer", "none", from_cache=False).startswith(
        "remove mixUp from spec.augmentation"
    )
    all_layers = spec(fineTune={"epochs": 2, "unfreeze": "all", "featureCache": "off"})
    assert input_bound_advice(all_layers, "fine-tune", "all", from_cache=False) == cores
    assert input_bound_advice(slow, "transfer", "none", from_cache=True) == (
        f"{cores}; raise spec.compute.memory so that features are not read from scratch"
    )
