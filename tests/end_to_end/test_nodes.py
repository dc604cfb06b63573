"""`topwork run --nodes`: training on two nodes of this machine, failures of a node, stops, and resumed runs."""

import json
import os
import re
import signal
import zipfile
from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest

MESSAGE = "Start the same job again to resume."
# An epoch takes a fraction of a second. By default, epochs store a checkpoint once a minute.
FREQUENT_CHECKPOINTS = {"gpus": 0, "checkpointMinutes": 1e-4}
LONG_TRANSFER = {"train": "all", "epochs": 500, "batchSize": 8, "featureCache": "off"}


def fetch(topwork, directory: Path, **variables: str) -> tuple[dict, list[np.ndarray]]:
    """Return the metrics and the weights of the published model."""
    fetched = topwork("models", "fetch", "s3://photos/topwork", "tiny", directory, **variables)
    assert fetched.returncode == 0, fetched.stderr
    with zipfile.ZipFile(directory / "model.keras") as archive:
        weights = h5py.File(BytesIO(archive.read("model.weights.h5")))
    arrays: list[np.ndarray] = []
    weights.visititems(lambda _, item: arrays.append(item[()]) if isinstance(item, h5py.Dataset) else None)
    return json.loads((directory / "metrics.json").read_text()), arrays


def node_pids(output: str, stage: str) -> list[int]:
    """Return the process IDs of the nodes of a stage, in the order of their indices."""
    found = re.findall(rf"node started node=(\d+) stage={stage} pid=(\d+)", output)
    return [int(pid) for _, pid in sorted(found)]


def epochs(output: str, node: int) -> list[int]:
    """Return the numbers of the epochs that a node logged."""
    lines = [line for line in output.splitlines() if "[info] epoch " in line and line.endswith(f"node={node}")]
    return [int(re.search(r" epoch=(\d+)", line)[1]) for line in lines]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


def test_two_nodes_publish_the_same_model_as_two_replicas(topwork, write_local_job, tmp_path):
    fine_tune = {"epochs": 2, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.001}}
    job = write_local_job(
        fineTune=fine_tune,
        model={"base": {"cnn": {"filters": [4, 8]}}, "head": {"dropout": 0.3}},
        augmentation={"flip": "horizontal"},
    )
    on_nodes = topwork("run", job, "--nodes", "2")
    assert on_nodes.returncode == 0, on_nodes.stderr
    assert on_nodes.stdout.startswith("Published tiny version 1: accuracy "), on_nodes.stdout
    assert [epochs(on_nodes.stderr, node) for node in (0, 1)] == [[1, 2, 1, 2]] * 2
    metrics, weights = fetch(topwork, tmp_path / "nodes")

    variables = {"TOPWORK_STATE": str(tmp_path / "other-state")}
    on_replicas = topwork("run", job, "--replicas", "2", **variables)
    assert on_replicas.returncode == 0, on_replicas.stderr
    expected_metrics, expected_weights = fetch(topwork, tmp_path / "replicas", **variables)
    assert metrics["metrics"] == expected_metrics["metrics"]
    assert len(weights) == len(expected_weights) > 4
    for array, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_array_equal(array, expected)

    again = topwork("run", job, "--nodes", "2")
    assert (again.returncode, again.stdout) == (0, on_nodes.stdout)
    assert "node started" not in again.stderr


def test_a_missed_gate_of_the_chief_ends_the_command_with_its_exit_code(topwork, write_local_job):
    job = write_local_job(evaluate={"gates": [{"metric": "accuracy", "atMost": 0.0}]})
    completed = topwork("run", job, "--nodes", "2")
    assert completed.returncode == 3, completed.stderr
    assert completed.stderr.splitlines()[-1].startswith("topwork: Not published: accuracy ")
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_node_ends_the_command_and_the_next_call_resumes(topwork, start_topwork, write_local_job, killed):
    job = write_local_job(transfer={**LONG_TRANSFER, "epochs": 12}, compute=FREQUENT_CHECKPOINTS)
    process = start_topwork("run", job, "--nodes", "2")
    process.wait_for(lambda: 3 in epochs(process.output, killed))
    pids = node_pids(process.output, "transfer")
    os.kill(pids[killed], signal.SIGKILL)
    assert process.process.wait(timeout=180) == 75, process.output
    assert process.output.splitlines()[-1].startswith(f"topwork: Node {killed} was killed by SIGKILL."), process.output
    assert f"Lost node {killed}: " in process.output
    assert not any(map(is_running, pids))

    completed = topwork("run", job, "--nodes", "2")
    assert completed.returncode == 0, completed.stderr
    resumed = epochs(completed.stderr, 0)
    assert resumed[-1] == 12
    assert len(resumed) < 12, completed.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_stores_a_checkpoint_and_the_next_call_resumes_on_one_node(
    topwork, start_topwork, write_local_job, number
):
    job = write_local_job(transfer=LONG_TRANSFER)
    process = start_topwork("run", job, "--nodes", "2")
    process.wait_for(lambda: 3 in epochs(process.output, 0))
    pids = node_pids(process.output, "transfer")
    assert process.send_signal(number) == 143, process.output
    assert process.output.splitlines()[-1] == f"topwork: Stopped. {MESSAGE}"
    assert "Traceback" not in process.output
    assert not any(map(is_running, pids))
    last = epochs(process.output, 0)[-1]

    resumed = start_topwork("run", job)
    resumed.wait_for_output("[info] epoch ")
    first = int(re.search(r"\[info\] epoch .*? epoch=(\d+)", resumed.output)[1])
    assert first >= last, resumed.output


def test_a_stopped_node_stops_all(start_topwork, write_local_job):
    process = start_topwork("run", write_local_job(transfer=LONG_TRANSFER), "--nodes", "2")
    process.wait_for(lambda: 3 in epochs(process.output, 1))
    os.kill(node_pids(process.output, "transfer")[1], signal.SIGTERM)
    assert process.process.wait(timeout=180) == 143, process.output
    assert process.output.splitlines()[-1] == f"topwork: Stopped. {MESSAGE}"


def test_nodes_do_not_outlive_a_killed_command(start_topwork, write_local_job):
    process = start_topwork("run", write_local_job(transfer=LONG_TRANSFER), "--nodes", "2")
    process.wait_for(lambda: 2 in epochs(process.output, 0))
    pids = node_pids(process.output, "transfer")
    process.kill()
    process.process.wait()
    for pid in pids:
        for _ in range(600):
            if not is_running(pid):
                break
            signal.sigtimedwait([], 0.1)
        assert not is_running(pid)


def test_replicas_and_nodes_cannot_be_combined(topwork, write_local_job):
    completed = topwork("run", write_local_job(), "--nodes", "2", "--replicas", "2")
    assert completed.returncode == 2
    assert completed.stderr == (
        "topwork: --replicas cannot be combined with --nodes: each node trains one replica per GPU, or one on the CPU. "
        "Use more nodes instead.\n"
    )


def test_a_batch_that_the_nodes_do_not_divide_is_rejected(topwork, write_local_job):
    completed = topwork("run", write_local_job(), "--nodes", "3")
    assert completed.returncode == 2, completed.stderr
    assert "batchSize: 8 is not divisible by spec.compute.nodes 3" in completed.stderr
    assert "pull" not in completed.stderr
