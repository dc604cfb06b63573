"""The model of docs/scaling.md."""

import json
import math
from pathlib import Path

import pytest
from benchmarks.scaling import MEASUREMENTS, Results, tables
from benchmarks.scaling_model import (
    WORKLOADS,
    AllReduce,
    Cluster,
    RingCost,
    Workload,
    download_seconds,
    efficiency,
    fit_ring_cost,
    fit_variable_seconds,
    measured_overlap,
    nccl_seconds,
    relative_errors,
    smallest_batch,
    step_seconds,
    variable_seconds,
)

COST = RingCost(
    hop_seconds=8e-4,
    hop_latencies=2.2,
    seconds_per_byte=1.8e-9,
    pipelined_seconds_per_byte=1.4e-9,
    link_share=0.95,
)
OPERATIONS = [
    AllReduce(nodes, size, bits_per_second, latency_seconds, nodes_per_core)
    for nodes, nodes_per_core in ((2, 1.0), (3, 1.5), (4, 2.0))
    for size in (4, 1e6, 2e7)
    for bits_per_second in (math.inf, 1e9, 3e8)
    for latency_seconds in (0.0, 0.005)
]


def test_each_node_of_a_ring_sends_almost_twice_the_tensor():
    assert [(AllReduce(nodes, 120).hops, AllReduce(nodes, 120).sent) for nodes in (1, 2, 4, 60)] == [
        (0, 0),
        (2, 120),
        (6, 180),
        (118, 236),
    ]


def test_time_of_an_all_reduce_is_the_sum_of_its_parts():
    operation = AllReduce(nodes=4, size=1e6, bits_per_second=1e9, latency_seconds=0.01)

    assert COST.seconds(operation) == pytest.approx(6 * (8e-4 + 2.2 * 0.01) + 1.5e6 * (1.8e-9 + 8e-9 / 0.95))


def test_processor_limits_an_all_reduce_on_a_fast_network():
    assert COST.seconds(AllReduce(4, 1e6, nodes_per_core=2)) == pytest.approx(6 * 8e-4 + 1.5e6 * 2 * 3.2e-9)


def test_fit_finds_the_parameters_that_explain_the_measurements():
    fitted = fit_ring_cost([(operation, COST.seconds(operation)) for operation in OPERATIONS])

    assert vars(fitted) == pytest.approx(vars(COST), rel=1e-3)


def test_fit_tolerates_noise_and_outliers():
    noisy = [(operation, COST.seconds(operation) * (1.1, 0.9)[i % 2]) for i, operation in enumerate(OPERATIONS)]
    noisy[7] = (noisy[7][0], 3 * noisy[7][1])

    fitted = fit_ring_cost(noisy)

    assert fitted.link_share == pytest.approx(0.95, rel=0.1)
    assert sorted(map(abs, relative_errors(fitted, noisy)))[-2] < 0.2


@pytest.mark.parametrize(("overlap", "expected"), [(0, 5.0), (0.5, 4.0), (1, 3.0)])
def test_overlap_hides_the_shorter_part_of_a_step(overlap, expected):
    assert step_seconds(3.0, 2.0, overlap) == expected
    assert measured_overlap(3.0, 2.0, expected) == overlap


def test_ring_between_gpus_follows_the_model_of_nccl():
    cluster = Cluster(nodes=2, gpus=8, bits_per_second=100e9, link_share=1.0)

    latency = 8.4 + 1.9 * (28 * 3.4 + 2 * 9.6)
    assert nccl_seconds(1e8, cluster) == pytest.approx(latency * 1e-6 + 1e8 * 30 / 16 / 12.5e9)


def test_tree_between_gpus_has_the_lower_latency_on_many_nodes():
    cluster = Cluster(nodes=64, gpus=8, bits_per_second=100e9, link_share=1.0)

    assert nccl_seconds(1e6, cluster) == pytest.approx(2 * (7 * 28 + 6 * 50) * 1e-6 + 2e6 / (0.9 * 12.5e9))


def test_one_gpu_reduces_nothing():
    assert nccl_seconds(1e9, Cluster(1, 1, 1e9, 1.0)) == 0


def test_one_node_is_fully_efficient_and_more_nodes_or_less_bandwidth_are_less_so():
    for workload in WORKLOADS:
        shares = [[efficiency(workload, Cluster(n, 8, rate, 0.9)) for n in (1, 2, 8, 64)] for rate in (25e9, 400e9)]

        assert [row[0] for row in shares] == [1, 1]
        assert all(row == sorted(row, reverse=True) for row in shares)
        assert all(slow < fast for slow, fast in zip(shares[0][1:], shares[1][1:], strict=True))
        assert min(min(row) for row in shares) > 0.3


def test_smallest_batch_reaches_the_efficiency():
    workload, cluster = WORKLOADS[0], Cluster(8, 8, 100e9, 0.9)

    batch_size = smallest_batch(workload, cluster, 0.9)

    def reached(size: int) -> float:
        return efficiency(Workload("", workload.parameters, 0, 0, workload.images_per_second, size), cluster)

    assert reached(batch_size) >= 0.9 > reached(batch_size - 1)


def test_workload_counts_the_variables_of_optimizer_and_average():
    workload = Workload("", parameters=1000, variables=10, trainable_variables=8, images_per_second=100, batch_size=50)

    assert (workload.compute_seconds, workload.gradient_bytes) == (0.5, 4000)
    assert (workload.created_variables, workload.checkpoint_bytes) == (34, 20000)


def test_time_to_create_a_variable_grows_with_the_levels_of_the_tree():
    fitted = fit_variable_seconds([(2, 0.006), (3, 0.010), (4, 0.010)])

    assert fitted == pytest.approx((0.002, 0.004))
    assert variable_seconds(fitted, 64) == pytest.approx(0.026)


def test_storage_limits_the_download_by_many_nodes():
    assert download_seconds(1e9, nodes=2, node_rate=25e9, storage_rate=100e9) == pytest.approx(0.32)
    assert download_seconds(1e9, nodes=64, node_rate=25e9, storage_rate=100e9) == pytest.approx(5.12)


@pytest.mark.parametrize(
    "title", ["All-reduce", "Training steps", "Variables", "Predicted efficiency", "Predicted limits"]
)
def test_documentation_contains_the_tables_that_follow_from_the_measurements(title):
    documentation = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()

    assert f"\n{tables(Results(json.loads(MEASUREMENTS.read_text())))[title]}\n" in documentation
