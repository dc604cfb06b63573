"""`topwork top` with runs on several nodes: the state of the run comes from node 0, that of each node from itself."""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from topwork.cli.top.views import format_details, format_runs, snapshot_to_json
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.prometheus.scrape import parse_page
from topwork.cluster.status.node_snapshots import CHIEF_MISSING, combine_nodes
from topwork.cluster.status.snapshot import RunSnapshot
from topwork.cluster.status.snapshot_calculation import ProcessLocation, ReadingHistory, compute_snapshot, node_of

RUN = "cats-1a2b3c4d"
START_TIME = 1_600_000_000.0


def gpu_lines(node: int, utilization: float) -> str:
    return f'topwork_gpu_utilization_ratio{{gpu="0",node="{node}",run="{RUN}",transferjob="cats"}} {utilization}\n'


def observe(node: int, *, nodes: int = 2, wait: float = 0.1, evaluation_seconds: float = 1.0) -> RunSnapshot:
    """Observe a node for two seconds, in which it trains ten steps of 64 images."""
    metrics = Metrics(gpus=False)
    metrics.start_job(job="cats", run=RUN, stage="transfer", version="1.2.3", node=node, nodes=nodes)
    history = ReadingHistory()
    with metrics.track_stage("transfer"):
        for at in (0.0, 2.0):
            text = generate_latest(metrics.labeled_registry).decode() + gpu_lines(node, 0.9 - 0.4 * node)
            history.add(parse_page(text, START_TIME + at))
            for _ in range(10):
                metrics.record_step(images=64, seconds=0.2)
            metrics.record_step_time(10 * wait, 10 * (0.2 - wait))
            metrics.record_evaluation_speed(images=100, seconds=evaluation_seconds)
            metrics.set_planned_epochs("transfer", 20)
            metrics.set_epoch("transfer", 7)
            metrics.count_storage_bytes("download", 2**20)
            metrics.count_storage_retry()
    location = ProcessLocation(f"pod {RUN}-{node}-abcde:9102", "ml", f"{RUN}-{node}-abcde")
    return compute_snapshot(history.readings, START_TIME + 2, location)


def test_a_run_is_shown_once_as_node_0_reports_it():
    (run,) = combine_nodes([observe(1, wait=0.15, evaluation_seconds=2.0), observe(0)])
    assert (run.run, run.state, run.epoch, run.pod, run.node_count) == (RUN, "running", 7, f"{RUN}-0-abcde", 2)
    assert run.speed is not None
    assert (run.speed.images_per_second, run.speed.step_seconds) == pytest.approx((320, 0.2))
    assert [node.index for node in run.nodes] == [0, 1]


def test_input_wait_is_that_of_the_node_that_waits_longest():
    (run,) = combine_nodes([observe(0, wait=0.02), observe(1, wait=0.15)])
    assert run.speed is not None
    assert run.speed.input_wait == pytest.approx(0.75)
    assert [node.input_wait for node in run.nodes] == pytest.approx([0.1, 0.75])


def test_traffic_retries_and_gpus_are_those_of_all_nodes():
    (run,) = combine_nodes([observe(0), observe(1)])
    assert run.traffic["download"].bytes == 2 * 2**20
    assert run.traffic["download"].bytes_per_second == 2**20
    assert run.retries == 2
    assert [(gpu.index, gpu.utilization) for gpu in run.gpus] == [("0/0", 0.9), ("1/0", 0.5)]
    assert "70% of 2" in list(format_runs([run]))[1]


def test_details_have_a_line_for_each_node_and_name_slow_and_unread_ones():
    run = combine_nodes([observe(0, nodes=4), observe(1, nodes=4, evaluation_seconds=2.0), observe(2, nodes=4)])[0]
    lines = [line for line in format_details(run) if "node" in line or "not read" in line]
    assert lines == [
        f"  node 0         running, 50% waiting, evaluates 100 images/s, GPUs 90% of 1 busy, {RUN}-0-abcde",
        f"  node 1         running, 50% waiting, evaluates 50 images/s (slow node), GPUs 50% of 1 busy, {RUN}-1-abcde",
        f"  node 2         running, 50% waiting, evaluates 100 images/s, GPUs 10% of 1 busy, {RUN}-2-abcde",
        "  not read       node 3",
    ]


def test_a_run_without_node_0_says_so():
    (run,) = combine_nodes([observe(1)])
    assert (run.reason, run.speed, run.epoch) == (CHIEF_MISSING, None, None)
    assert list(format_runs([run]))[1].endswith(f"running: {CHIEF_MISSING}")


def test_a_node_that_does_not_answer_is_shown_with_the_reason():
    gone = replace(observe(1), state="gone", reason="last answer 2m ago", read_seconds_ago=120.0)
    (run,) = combine_nodes([observe(0), gone])
    assert (run.state, run.nodes[1].state, run.nodes[1].read_seconds_ago) == ("running", "gone", 120.0)
    assert any(line.startswith("  node 1         gone: last answer 2m ago, ") for line in format_details(run))


def test_only_the_newest_process_of_a_node_is_shown():
    earlier = replace(observe(1), state="gone", read_seconds_ago=60.0)
    for processes in ([observe(0), earlier, observe(1)], [observe(0), observe(1), earlier]):
        (run,) = combine_nodes(processes)
        assert [node.state for node in run.nodes] == ["running", "running"]


def test_runs_of_different_namespaces_are_not_combined():
    other = replace(observe(1), namespace="other")
    assert [run.namespace for run in combine_nodes([observe(0), other])] == ["ml", "other"]


def test_runs_on_one_node_are_unchanged():
    metrics = Metrics(gpus=False)
    metrics.start_job(job="cats", run=RUN, stage="run", version="1.2.3")
    reading = parse_page(generate_latest(metrics.labeled_registry).decode(), START_TIME)
    snapshot = compute_snapshot([reading], START_TIME, ProcessLocation("http://127.0.0.1:9101/metrics"))
    assert (snapshot.nodes, snapshot.node_count) == ((), None)
    assert combine_nodes([snapshot, snapshot]) == [snapshot, snapshot]


@pytest.mark.parametrize(
    ("labels", "node"),
    [
        ('node="3"', 3),
        ('node="ip-10-0-0-1",exported_node="3"', 3),
        ('node="ip-10-0-0-1"', None),
        ('node="99999999"', None),
        ('pod="cats"', None),
    ],
)
def test_the_machine_that_prometheus_adds_as_a_label_is_not_the_node(labels, node):
    assert node_of(parse_page(f"topwork_nodes{{{labels}}} 4\n", START_TIME)) == node


def test_a_restarted_node_starts_a_new_history():
    def page(seconds: float) -> str:
        return f'topwork_step_compute_seconds_total{{node="1",run="{RUN}"}} {seconds}\n'

    history = ReadingHistory()
    for at, seconds in ((0, 100.0), (2, 5.0)):
        history.add(parse_page(page(seconds), START_TIME + at))
    assert len(history.readings) == 1


def test_json_has_the_nodes():
    (run,) = combine_nodes([observe(0), observe(1)])
    output = snapshot_to_json(run)
    assert output["nodeCount"] == 2
    assert output["nodes"][1] == {
        "index": 1,
        "source": f"pod {RUN}-1-abcde:9102",
        "pod": f"{RUN}-1-abcde",
        "state": "running",
        "reason": None,
        "inputWait": pytest.approx(0.5),
        "evaluatedPerSecond": 100.0,
        "gpus": [
            {
                "index": "0",
                "utilization": 0.5,
                "memoryUsedBytes": None,
                "memoryTotalBytes": None,
                "powerWatts": None,
                "temperatureCelsius": None,
            }
        ],
        "readSecondsAgo": 0.0,
    }
