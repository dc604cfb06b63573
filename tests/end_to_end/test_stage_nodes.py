"""`topwork stage` in the pods of a run on two nodes: waiting for each other, results, and completed stages."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.end_to_end.conftest import Pod

FINE_TUNE = {"epochs": 1, "unfreeze": "all", "optimizer": {"name": "adam", "learningRate": 0.0001}}


@pytest.fixture
def pods(environment, s3_settings, tmp_path, preloaded_python) -> Iterator[list[Pod]]:
    """The pods of a run on two nodes, with the same Job and Secret."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        first, second, coordinator = (f"127.0.0.1:{bound.getsockname()[1]}" for bound in sockets)
    variables = environment | {
        "AWS_ENDPOINT_URL": s3_settings.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3_settings.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_settings.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
        "TOPWORK_ATTEMPT": "uid-1",
        "TOPWORK_NODES": f"{first},{second}",
        "TOPWORK_COORDINATOR": coordinator,
        "TOPWORK_PEER_TIMEOUT_SECONDS": "600",
    }
    pods = []
    for index in range(2):
        (tmp_path / f"pod-{index}").mkdir()
        pods.append(Pod(tmp_path / f"pod-{index}", variables | {"JOB_COMPLETION_INDEX": str(index)}, preloaded_python))
    yield pods
    for pod in pods:
        for container in pod.containers:
            container.kill()


def run_stage(pods: list[Pod], stage: str, job, **variables: str):
    """Run a stage on all nodes, and return their exit codes and termination messages."""
    containers = [pod.start(stage, job, **variables) for pod in pods]
    return [container.wait() for container in containers]


def test_two_pods_train_and_node_0_publishes(pods, write_job, storage):
    job = write_job(fineTune=FINE_TUNE)
    waiting = pods[1].start("pull", job)
    waiting.wait_for_output("waiting until node 0 has pulled the dataset")
    assert pods[0].run("pull", job)[0] == 0
    code, message = waiting.wait()
    assert (code, message.outcome, message.node) == (0, "done", 1)

    for code, message in run_stage(pods, "transfer", job):
        assert (code, message.outcome, message.epochs) == (0, "done", 2), message
    (first, published), (second, trained) = run_stage(pods, "fine-tune", job)
    assert (first, second) == (0, 0)
    assert (published.node, trained.node) == (0, 1)
    assert published.model == f"{storage.uri}/models/tiny/1"
    assert trained.model is None

    # Completed stages wait for nobody.
    for pod in pods:
        for stage in ("pull", "transfer", "fine-tune"):
            code, message, container = pod.run(stage, job)
            assert (code, message.outcome) == (0, "done"), container.output
            assert "nodes connected" not in container.output


def test_a_node_that_is_late_finds_the_training_complete(pods, write_job, storage):
    job = write_job()
    assert pods[0].run("pull", job)[0] == 0
    # The version is not published yet, but nothing is left to train.
    alone = dict.fromkeys(("TOPWORK_NODES", "TOPWORK_COORDINATOR", "JOB_COMPLETION_INDEX"))
    assert pods[0].run("transfer", job, **alone)[0] == 0
    code, message, container = pods[1].run("fine-tune", job)
    assert (code, message.outcome, message.model) == (0, "done", None), container.output
    assert "training is already complete" in container.output
    code, message, container = pods[0].run("fine-tune", job)
    assert (code, message.model) == (0, f"{storage.uri}/models/tiny/1"), container.output
    assert "nodes connected" not in container.output


@pytest.mark.parametrize("present", [0, 1])
def test_a_missing_node_is_named(pods, write_job, present):
    job = write_job()
    assert pods[0].run("pull", job)[0] == 0
    code, message, container = pods[present].run("transfer", job, TOPWORK_PEER_TIMEOUT_SECONDS="2")
    assert (code, message.outcome, message.node) == (75, "failed", present)
    assert message.error.startswith(f"Waited 2 s for node {1 - present} of 2.")
    assert container.field("waiting for nodes", "missing") == [1 - present]


@pytest.mark.parametrize("stage", ["pull", "transfer"])
def test_a_node_stops_while_it_waits(pods, write_job, stage):
    job = write_job()
    if stage == "transfer":
        assert pods[0].run("pull", job)[0] == 0
    container = pods[1].start(stage, job)
    container.wait_for_output("waiting ")
    code, message = container.stop(60)
    assert (code, message.outcome, message.node) == (143, "stopped", 1)


def test_earlier_results_are_not_taken_for_those_of_a_restarted_job(pods, write_job):
    job = write_job()
    assert run_stage(pods, "pull", job)[1][0] == 0
    restarted = {"TOPWORK_ATTEMPT": "uid-2", "TOPWORK_RESTART": "true"}
    waiting = pods[1].start("pull", job, **restarted)
    waiting.wait_for_output("waiting for node 0 to delete the results of the run")
    assert waiting.process.poll() is None
    assert pods[0].run("pull", job, **restarted)[0] == 0
    assert waiting.wait()[0] == 0


def test_a_malformed_address_is_reported(pods, write_job):
    code, message, _ = pods[0].run("pull", write_job(), TOPWORK_COORDINATOR="nowhere")
    assert (code, message.outcome) == (2, "failed")
    assert message.error.startswith("TOPWORK_COORDINATOR is 'nowhere'")


def test_nodes_with_different_specs_do_not_train_together(pods, write_job, tmp_path):
    variables = {"TOPWORK_RUN": "tiny-12345678", "TOPWORK_PEER_TIMEOUT_SECONDS": "20"}
    other = tmp_path / "other.yaml"
    other.write_bytes(write_job(evaluate={"metrics": ["accuracy", "f1"]}).read_bytes())
    job = write_job()
    assert pods[0].run("pull", job, **variables)[0] == 0
    containers = [pods[0].start("transfer", job, **variables), pods[1].start("transfer", other, **variables)]
    (first, message), (second, rejected) = [container.wait() for container in containers]
    assert (first, second) == (75, 75)
    assert "Last problem: a client at 127.0.0.1 was rejected: its spec is " in message.error
    assert rejected.error
