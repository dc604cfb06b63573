"""Finds the stages of a job whose results are already in storage, so that a run would reuse them."""

from topwork.clients.s3.storage import Storage
from topwork.description.job_description import PlanDescription
from topwork.errors import DataError, UnavailableError
from topwork.registry import versions
from topwork.registry.cross_validation import fold_jobs
from topwork.registry.datasets import select_dataset
from topwork.registry.runs import validation_key
from topwork.registry.stage_keys import StageKeys, run_name, stage_keys
from topwork.registry.stage_results import Classifier, TrainingStage, read_stage_result
from topwork.spec import TransferJob
from topwork.stages.pull import find_dataset
from topwork.workspace import Workspace


def find_reusable_results(job: TransferJob, workspace: Workspace) -> PlanDescription:
    """Find which stages a run of a job would reuse and which it would run, without changing anything.

    Args:
        job: The job.
        workspace: Storage of the job, and scratch for a table on S3.

    Returns:
        The stages, or why they are unknown.
    """
    stages = ["pull", *(f"fold {fold.spec.dataset.fold}" for fold in fold_jobs(job))]
    end = "publish" if job.spec.publishes else "validate"
    if job.spec.publishes or not job.spec.dataset.folds:
        stages += ["transfer", *(["fine-tune"] if job.spec.fine_tune else []), end]
    try:
        selected = select_dataset(job, workspace, download=False)
        dataset = selected.stored if selected else find_dataset(job, workspace)
    except (DataError, UnavailableError) as error:
        return PlanDescription(unknown=f"the source cannot be read from here: {error}")
    changes = selected.changes if selected else ""
    fingerprint = dataset.metadata.fingerprint if dataset else selected.fingerprint if selected else None
    if fingerprint is None:
        return PlanDescription(runs=tuple(stages), changes=changes)
    try:
        keys = stage_keys(job, fingerprint, workspace.storage)
    except DataError as error:
        return PlanDescription(unknown=str(error))
    reused = ["pull"] if dataset else []
    for fold in fold_jobs(job):
        results = _read_results(stage_keys(fold, fingerprint, workspace.storage), workspace.storage)
        reused += [f"fold {fold.spec.dataset.fold}"] if all(results.values()) else []
    results = _read_results(keys, workspace.storage)
    reused += [stage for stage, result in results.items() if result and stage in stages]
    last = list(results.values())[-1]
    if last and versions.find_version_by_key(workspace.storage, job.model_name, keys.publish, last.file.sha256):
        reused.append("publish")
    if "validate" in stages and workspace.storage.size(validation_key(run_name(job, keys))) is not None:
        reused.append("validate")
    return PlanDescription(
        run=run_name(job, keys) if selected else None,
        reuses=tuple(reused),
        runs=tuple(stage for stage in stages if stage not in reused),
        changes=changes,
    )


def _read_results(keys: StageKeys, storage: Storage) -> dict[TrainingStage, Classifier | None]:
    return {stage: read_stage_result(storage, stage, key) for stage, key in keys.training_stages.items()}
