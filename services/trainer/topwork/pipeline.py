"""The whole flow on one screen: pull, transfer, fine-tune, publish. Start reading here.

`topwork run` calls `run`. In a cluster the containers of the Job call `run_pull`, `run_transfer` and `run`, one after
the other: each finds in storage what those before it have done.
"""

from topwork.data.dataset_manifest import StoredDataset
from topwork.disk_space import room_told
from topwork.registry.garbage_collection import of_finished_stages
from topwork.registry.stage_results import Classifier
from topwork.spec import TransferJob
from topwork.spec.yaml_output import yaml_text
from topwork.stages.fine_tune import fine_tune
from topwork.stages.publish import Published, publish
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.strategy import strategy
from topwork.workspace import Workspace


def run(job: TransferJob, workspace: Workspace) -> Published:
    """Run a job from its dataset to its published model.

    Every stage is idempotent: one that is done is found and skipped, one that was begun goes on from its last
    checkpoint. Calling this again after a kill, a stop or a failure is always right.

    Args:
        job: The job to run.
        workspace: Storage, metrics, progress and scratch of the run.

    Returns:
        The published version with its metrics.

    Raises:
        TopworkError: With the exit code that the cluster acts on; see `topwork.errors`.
    """
    with room_told(workspace.scratch):
        begin(job, workspace)
        dataset = pull(job, workspace)
        classifier = transfer(job, dataset, workspace)
        if job.spec.fine_tune:
            classifier = fine_tune(job, classifier, dataset, workspace)
        return publish(job, classifier, dataset, workspace)


def run_transfer(job: TransferJob, workspace: Workspace) -> Classifier:
    """Run a job as far as its transferred classifier; takes and raises what `run` does."""
    with room_told(workspace.scratch):
        begin(job, workspace)
        return transfer(job, pull(job, workspace), workspace)


def run_pull(job: TransferJob, workspace: Workspace) -> StoredDataset:
    """Run a job as far as its stored dataset; another process may pull for the same run at the same time."""
    with room_told(workspace.scratch):
        keep_spec(job, workspace)
        return pull(job, workspace)


def begin(job: TransferJob, workspace: Workspace) -> None:
    """Prepare to train: the only process that works on this run starts anew or goes on.

    Args:
        job: The job.
        workspace: Storage of the run, and its replicas.
    """
    # First of all: TensorFlow takes no more replicas once pull has started it.
    strategy(workspace.replicas)
    clear_leftovers(job, workspace)
    keep_spec(job, workspace)


def clear_leftovers(job: TransferJob, workspace: Workspace) -> None:
    """Give back what half-written uploads of killed processes hold: of this run all, of others what is a day old.

    Checkpoints and features of stages that are done go, too.

    Args:
        job: The job; no other process trains its run.
        workspace: Storage of the run.
    """
    workspace.storage.uploads.abort_unfinished(f"runs/{job.run}/", older_than_seconds=0)
    workspace.storage.uploads.abort_unfinished()
    stored = list(workspace.storage.list(f"runs/{job.run}/"))
    for leftover in of_finished_stages(workspace.storage, stored):
        workspace.storage.delete(leftover.keys)


def keep_spec(job: TransferJob, workspace: Workspace) -> None:
    """Store the spec of the run beside what it makes, so that its name can be read back.

    Args:
        job: The job.
        workspace: Storage of the run.
    """
    workspace.storage.write(f"runs/{job.run}/spec.yaml", yaml_text(job).encode(), content_type="application/yaml")
