"""Training a stage on several nodes: connecting them, and what a node does when another one has failed or is done."""

import importlib.metadata
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from topwork.cli.runtime.container import Container
from topwork.errors import TopworkError, UnavailableError
from topwork.nodes.group import NodeGroup
from topwork.nodes.rendezvous import join
from topwork.registry.completion import is_training_complete, read_last_result

if TYPE_CHECKING:
    from topwork.data.dataset_manifest import StoredDataset
    from topwork.registry.cross_validation import CrossValidation
    from topwork.registry.stage_results import Classifier, TrainingStage
    from topwork.spec import TransferJob
    from topwork.stages.publish import Published
    from topwork.stages.validate import Validated
    from topwork.workspace import Workspace

    Result = Classifier | Published | Validated | CrossValidation

log = structlog.get_logger(__name__)

# Nodes with other versions compute other weights, or other operations.
COMPARED_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras")
ANSWER_SECONDS = 5.0
"""Time for storage to answer before this process ends."""


def train_on_nodes(
    container: Container,
    job: "TransferJob",
    workspace: "Workspace",
    *,
    pull: "Callable[[Workspace], StoredDataset]",
    train: "Callable[[Workspace], Result]",
) -> "Result":
    """Run a training stage together with the other nodes.

    If its training is already complete, node 0 continues alone, for example to publish, and the others are done.

    Args:
        container: The container, whose stage is a training stage.
        job: The job.
        workspace: Workspace of the run. Its nodes are not connected yet.
        pull: Pulls the dataset, or waits for it, if it is not stored.
        train: Runs the stage with the nodes of a workspace.

    Returns:
        The result of the stage; the trained classifier on other nodes than node 0.

    Raises:
        UnavailableError: If another node failed, or did not start in time.
        Stopped: If this or another node was stopped.
    """
    from topwork.stages.pull import find_dataset

    stage: TrainingStage = "transfer" if container.stage == "transfer" else "fine-tune"
    dataset = find_dataset(job, workspace) or pull(workspace)

    def is_complete() -> bool:
        return is_training_complete(job, stage, dataset, workspace.storage)

    def last_result() -> "Classifier":
        return read_last_result(job, stage, dataset, workspace.storage)

    nodes = None if is_complete() else _join(job, workspace, is_complete)
    if nodes is None:
        log.info("training is already complete", node=workspace.nodes.index)
        return train(replace(workspace, nodes=NodeGroup())) if workspace.nodes.is_chief else last_result()
    container.nodes = nodes
    nodes.on_failure(lambda error: _exit_after_failure(container, error, is_complete), draft=container.draft_failure)
    try:
        result = train(replace(workspace, nodes=nodes))
    except UnavailableError as error:
        # Node 0 may end as soon as it has stored the result.
        if nodes.is_chief or not is_complete():
            raise
        log.info("training is complete", node=nodes.index, reason=str(error))
        result = last_result()
    nodes.close()
    return result


def _join(job: "TransferJob", workspace: "Workspace", is_complete: Callable[[], bool]) -> NodeGroup | None:
    return join(
        workspace.nodes.node,
        {"scratch_bytes": shutil.disk_usage(workspace.scratch).free},
        is_complete=is_complete,
        stop=workspace.stop,
        identity={"run": job.run, "spec": job.digest, "job": workspace.attempt, **_versions()},
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in COMPARED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _exit_after_failure(container: Container, error: TopworkError, is_complete: Callable[[], bool]) -> None:
    """End the process whose main thread does not end after the failure of another node.

    TensorFlow can block in a collective operation. But a node that fails after node 0 has stored the result of the
    last training stage does not prevent node 0 from publishing it.
    """
    if container.nodes.is_chief and _answer_within(ANSWER_SECONDS, is_complete):
        return
    container.exit_from_thread(error)


def _answer_within(seconds: float, question: Callable[[], bool]) -> bool:
    """Ask storage a question; False without an answer in time: this node may have lost its network altogether."""
    answers: list[bool] = []

    def ask() -> None:
        with suppress(TopworkError):
            answers.append(question())

    thread = threading.Thread(target=ask, name="storage", daemon=True)
    thread.start()
    thread.join(seconds)
    return any(answers)
