"""Submitting a TransferJob: applying it, unless the cluster has the same one, and replacing one that is finished."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.manifests.transfer_job import build_transfer_job, parse_transfer_job
from topwork.cluster.names import CHECKED_RUN_ANNOTATION, DATASET_ANNOTATION, RESTART_ANNOTATION, RUN_LABEL
from topwork.cluster.operations.diff import describe_spec_diff
from topwork.cluster.operations.runs import DELETION_TIMEOUT_SECONDS, MIN_PAUSE_SECONDS
from topwork.cluster.operations.transfer_jobs import TRANSFER_JOB, get_transfer_job, owner_transfer_job
from topwork.cluster.status.objects import (
    get_annotation,
    is_being_deleted,
    is_job_finished,
    kubectl_name,
    name_of,
    owner_uids,
)
from topwork.cluster.status.transfer_job_run import is_processed, read_transfer_job_status
from topwork.errors import SettingError, UnavailableError
from topwork.spec import TransferJob
from topwork.spec.loading.defaults import SECTIONS, SpecDefaults
from topwork.spec.loading.yaml_document import Path

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

Outcome = Literal["submitted", "replaced", "changed", "unchanged", "complete"]
MAX_PAUSE_SECONDS = 5.0
GRACE_SECONDS = 300
"""Time for a checkpoint if a pod does not name its grace period."""
SUBMIT_ANNOTATIONS = {CHECKED_RUN_ANNOTATION, DATASET_ANNOTATION, RESTART_ANNOTATION}
"""Annotations that do not change a run that exists."""


def build_object(job: TransferJob, options: RenderOptions, filled: Collection[Path] = ()) -> KubernetesObject:
    """Build the TransferJob to apply, with only the values that the spec and the options set.

    Args:
        job: The job.
        filled: Paths of values that come from the defaults of the namespace: the controller fills them in.
        options: Namespace; image, which replaces that of the spec; dataset and restart, which become annotations.

    Returns:
        The object.

    Raises:
        SpecError: If the spec refers to files on this machine, which pods can't read.
    """
    render(job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": False})}), options)
    obj = build_transfer_job(job, options.namespace)
    for path in filled:
        remove_value(obj, path)
    if options.image:
        obj["spec"]["compute"] = (obj["spec"].get("compute") or {}) | {"image": options.image}
    annotations = {DATASET_ANNOTATION: options.dataset} if options.dataset else {}
    annotations |= {RESTART_ANNOTATION: "true"} if options.restart else {}
    return _with_annotations(obj, annotations)


def remove_value(obj: KubernetesObject, path: Path) -> None:
    """Remove a value of the spec of a job or of a template, and a section that it leaves empty."""
    *parents, key = map(str, path)
    sections = [obj]
    for parent in parents:
        sections.append(sections[-1].get(parent) or {})
    sections[-1].pop(key, None)
    if not sections[-1] and parents[-1] in SECTIONS:
        sections[-2].pop(parents[-1], None)


def _with_annotations(obj: KubernetesObject, annotations: dict[str, str]) -> KubernetesObject:
    if not annotations:
        return obj
    merged = (obj["metadata"].get("annotations") or {}) | annotations
    return obj | {"metadata": obj["metadata"] | {"annotations": merged}}


class _Plan(NamedTuple):
    """What a submission does, and a message that explains it; the message continues the name of the TransferJob."""

    outcome: Outcome
    message: str = ""


@dataclass(frozen=True)
class TransferJobSubmission:
    """Submits a TransferJob.

    Attributes:
        cluster: The cluster, with the namespace of the TransferJob.
        obj: The TransferJob to apply, without status.
        run: Name of its run, with the defaults of the namespace.
        report: Callback for progress messages, one line each.
        checked_run: Name of the run with the dataset that its source gives now; empty if the source was not checked.
        source_changed: Whether the source differs from the dataset that was used before.
        defaults: Defaults of the namespace that the controller fills in.
        timeout_seconds: How long deletion may take in addition to the grace period.
    """

    cluster: "Cluster"
    obj: KubernetesObject
    run: str
    report: Callable[[str], None]
    checked_run: str = ""
    source_changed: bool = False
    defaults: SpecDefaults | None = None
    timeout_seconds: float = field(default=DELETION_TIMEOUT_SECONDS, kw_only=True)

    @property
    def _name(self) -> str:
        return f"transferjob/{name_of(self.obj)}"

    def submit(self, *, restart: bool = False, rerun: bool = False) -> Outcome:
        """Apply the TransferJob.

        Args:
            restart: Whether to delete the results of the run first, and to start a complete run again.
            rerun: Whether to start a complete run again: its pods check the source, and skip stages whose inputs are
                the same.

        Returns:
            `submitted` if it is new; `replaced` if it replaces one that was finished; `changed` if its spec, labels or
            annotations changed; `unchanged` if it is pending, suspended or running, and `complete` if it is complete,
            with the same spec.

        Raises:
            InvalidSpecError: If values that another field manager set do not fit this spec.
            SettingError: If the API server rejects the TransferJob, the same run exists as a plain Job, or its dataset
                or results are in use.
            UnavailableError: If an object is not deleted in time, or the API server does not respond.
        """
        existing = self._get_settled()
        plan = self._plan(existing, restart=restart, rerun=rerun)
        if plan.message:
            self.report(f"{self._name} {plan.message}")
        if plan.outcome == "replaced" and existing is not None:
            self.cluster.delete(
                TRANSFER_JOB, name_of(existing), uid=existing["metadata"]["uid"], propagation="Foreground"
            )
            self._wait_until_deleted(existing)
        if plan.outcome in {"submitted", "replaced", "changed"}:
            self.cluster.apply(self._annotated(restart=restart and plan.outcome != "changed"))
        return plan.outcome

    def preview(self, *, restart: bool = False, rerun: bool = False) -> Outcome:
        """Return what `submit` would do, after the API server has validated the TransferJob; nothing is stored."""
        existing = get_transfer_job(self.cluster, name_of(self.obj))
        if existing is None or is_being_deleted(existing):
            self.cluster.apply(self.obj, dry_run=True)
            return "submitted"
        return self._plan(existing, restart=restart, rerun=rerun).outcome

    def _plan(self, existing: KubernetesObject | None, *, restart: bool, rerun: bool) -> _Plan:
        if existing is None:
            self._reject_plain_jobs()
            return _Plan("submitted")
        status = read_transfer_job_status(existing)
        is_active = not status.is_final or not is_processed(existing)
        if is_active:
            self._reject_changes_in_use(existing, restart=restart)
        if is_active or (status.state == "Complete" and not restart and not rerun):
            is_same = _content(self._preview(existing)) == _content(existing)
            return (
                self._plan_change(status.run, is_same=is_same) if is_active else self._plan_complete(existing, is_same)
            )
        # A TransferJob that would be rejected must not replace the existing one.
        self.cluster.apply(self.obj, dry_run=True, force=True)
        cause = {"Failed": "has failed", "Cancelled": "was canceled"}.get(status.state, "is complete")
        return _Plan("replaced", f"{cause} and is replaced: the run {_describe_resume(restart=restart)}")

    def _plan_change(self, current_run: str | None, *, is_same: bool) -> _Plan:
        if is_same:
            return _Plan("unchanged")
        if current_run in {None, self.run}:
            return _Plan("changed")
        self._reject_plain_jobs()
        return _Plan("changed", f"has changed: {current_run} is stopped with a checkpoint and replaced by {self.run}")

    def _plan_complete(self, existing: KubernetesObject, is_same: bool) -> _Plan:
        run = read_transfer_job_status(existing).run
        checked = get_annotation(existing, CHECKED_RUN_ANNOTATION)
        has_changed = checked != self.checked_run if checked and self.checked_run else self.source_changed
        if has_changed:
            return _Plan("replaced", "is complete and is replaced: its source has changed")
        if run == self.run:
            return _Plan("complete" if is_same else "changed")
        if is_same:
            return _Plan("replaced", f"is complete and is replaced: the defaults of the namespace make it {self.run}")
        return _Plan("changed", f"has changed: {run} is complete and followed by {self.run}")

    def _annotated(self, *, restart: bool) -> KubernetesObject:
        own = {CHECKED_RUN_ANNOTATION: self.checked_run} if self.checked_run else {}
        own |= {RESTART_ANNOTATION: "true"} if restart else {}
        return _with_annotations(self.obj, own)

    def _preview(self, existing: KubernetesObject) -> KubernetesObject:
        """Return the TransferJob as the API server would store it.

        Raises:
            SettingError: If it would keep values that another field manager set, and that change the run.
        """
        preview = self.cluster.apply(self.obj, dry_run=True)
        merged = parse_transfer_job(preview, self.defaults)
        if merged.run != self.run:
            diff = describe_spec_diff(parse_transfer_job(self.obj, self.defaults), merged)
            raise SettingError(
                f"{self._name} in namespace {self.cluster.namespace} would keep values that another tool set, and that "
                f"this spec does not set: {diff}. Set them in the spec, or delete the TransferJob and submit it again: "
                f"kubectl delete transferjob {name_of(existing)} -n {self.cluster.namespace}"
            )
        return preview

    def _reject_changes_in_use(self, existing: KubernetesObject, *, restart: bool) -> None:
        """Refuse to delete results, or to change the dataset, of a run that is not finished."""
        before, after = (get_annotation(obj, DATASET_ANNOTATION) for obj in (existing, self.obj))
        if restart:
            problem = "is not finished, so --restart would delete results in use"
        elif before != after:
            source = "the dataset of its source"
            problem = f"is not finished and uses {before or source}, not {after or source}"
        else:
            return
        namespace = self.cluster.namespace
        raise SettingError(
            f"{self._name} in namespace {namespace} {problem}. Wait until it is finished, or stop it with: "
            f"topwork cancel {name_of(existing)} -n {namespace}"
        )

    def _reject_plain_jobs(self) -> None:
        """Refuse to submit a run that an unfinished Job without a TransferJob trains."""
        for run in dict.fromkeys(filter(None, (self.run, self.checked_run))):
            for job in self.cluster.list("Job", labels=f"{RUN_LABEL}={run}"):
                if owner_transfer_job(job) is None and not is_job_finished(job):
                    namespace = self.cluster.namespace
                    raise SettingError(
                        f"{kubectl_name(job)} in namespace {namespace} is the same run, submitted as a plain Job, and "
                        f"is not finished. Wait until it is finished, or stop it with: topwork cancel {run} --as job "
                        f"-n {namespace}"
                    )

    def _get_settled(self) -> KubernetesObject | None:
        """Return the existing TransferJob; if it is being deleted, wait until it is gone."""
        existing = get_transfer_job(self.cluster, name_of(self.obj))
        if existing is None or not is_being_deleted(existing):
            return existing
        self.report(f"{self._name} is being deleted: waiting")
        self._wait_until_deleted(existing)
        return get_transfer_job(self.cluster, name_of(self.obj))

    def _wait_until_deleted(self, existing: KubernetesObject) -> None:
        name, uid, pause = name_of(existing), existing["metadata"]["uid"], MIN_PAUSE_SECONDS
        run = read_transfer_job_status(existing).run or self.run
        deadline = time.monotonic() + GRACE_SECONDS + self.timeout_seconds

        def is_gone() -> bool:
            current = get_transfer_job(self.cluster, name)
            if current is not None and current["metadata"]["uid"] == uid:
                return False
            return not any(uid in owner_uids(job) for job in self.cluster.list("Job", labels=f"{RUN_LABEL}={run}"))

        while not is_gone():
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"{self._name} has not been deleted in time. Is the node of its pod down? See kubectl get pods "
                    f"-o wide -n {self.cluster.namespace}, and submit again."
                )
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)


def _content(obj: KubernetesObject) -> tuple[object, ...]:
    """Return what decides whether two TransferJobs are the same."""
    metadata = obj["metadata"]
    annotations = metadata.get("annotations") or {}
    own = {key: value for key, value in annotations.items() if key not in SUBMIT_ANNOTATIONS}
    return obj.get("spec"), metadata.get("labels") or {}, own


def _describe_resume(*, restart: bool) -> str:
    return "starts over" if restart else "reuses its stages and resumes from its last checkpoint"
