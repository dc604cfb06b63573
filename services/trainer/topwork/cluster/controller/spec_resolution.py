"""What a TransferJob asks for: its validated spec with namespace defaults, rendered as Kubernetes objects."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.node_network import read_network
from topwork.cluster.controller.observation import Observation
from topwork.cluster.controller.run_objects import build_run_objects
from topwork.cluster.manifests.defaults import DEFAULTS_SOURCE, read_defaults
from topwork.cluster.manifests.render import RenderedObjects, RenderOptions
from topwork.cluster.manifests.transfer_job import parse_transfer_job
from topwork.cluster.names import (
    APP_NAME,
    DATASET_ANNOTATION,
    GENERATION_ANNOTATION,
    JOB_FILE,
    PART_OF_LABEL,
    RESTART_ANNOTATION,
    SELECTED_RUN_ANNOTATION,
)
from topwork.cluster.status.objects import get_annotation, get_controller, get_label, kubectl_name, name_of
from topwork.errors import SettingError, SpecError
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_bytes
from topwork.spec.loading.problems import InvalidSpecError

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster

RejectionReason = Literal["InvalidSpec", "InvalidDefaults", "NameConflict", "InvalidJournal"]


@dataclass(frozen=True)
class Target:
    """The run that a TransferJob asks for.

    Attributes:
        run: Name of the run.
        objects: Its objects; None if the TransferJob is suspended.
        unowned_job: A Job of topwork with the name of the run that belongs to no TransferJob.
        stale_config_map: UID of a ConfigMap with the name of the run that belongs to a deleted TransferJob.
        stale_network: Such a Service and NetworkPolicy, and those of the run if it no longer has several nodes.
    """

    run: str
    objects: RenderedObjects | None = None
    unowned_job: KubernetesObject | None = None
    stale_config_map: str | None = None
    stale_network: tuple[KubernetesObject, ...] = ()


@dataclass(frozen=True)
class Rejection:
    """Why a TransferJob is not accepted.

    Attributes:
        reason: Reason of the condition Accepted.
        message: All problems.
        is_retried: Whether it may become acceptable without a change of its spec.
    """

    reason: RejectionReason
    message: str
    is_retried: bool


def resolve(cluster: "Cluster", seen: Observation) -> Target | Rejection:
    """Find out what a TransferJob asks for.

    A run that was accepted is created again from its stored spec, whatever the defaults of the namespace are now.

    Args:
        cluster: The cluster, with the namespace of the TransferJob.
        seen: The TransferJob and its Jobs.

    Returns:
        The run, or why the TransferJob is not accepted.

    Raises:
        UnavailableError: If the API server does not respond.
    """
    job, image = _read_stored_job(cluster, seen), None
    if job is None:
        try:
            defaults = read_defaults(cluster)
        except SettingError as error:
            return Rejection("InvalidDefaults", str(error), is_retried=True)
        image = defaults.image if defaults else None
        try:
            job = parse_transfer_job(seen.transfer_job, defaults.spec if defaults else None)
        except SpecError as error:
            return _reject_spec(error, seen)
    try:
        target = _render(job, seen, image)
    except SpecError as error:
        return Rejection("InvalidSpec", str(error), is_retried=False)
    except SettingError as error:  # the image of the defaults
        return Rejection("InvalidDefaults", f"{DEFAULTS_SOURCE}: {error}", is_retried=True)
    return _check_names(cluster, target, seen)


def _reject_spec(error: SpecError, seen: Observation) -> Rejection:
    if isinstance(error, InvalidSpecError) and any(problem.file == DEFAULTS_SOURCE for problem in error.problems):
        return Rejection("InvalidDefaults", str(error), is_retried=True)
    # The ConfigMap with the defaults may be created after the TransferJob.
    is_incomplete = "storage" not in (seen.transfer_job.get("spec") or {})
    hint = f"\nThe namespace can also set it for all jobs: in {DEFAULTS_SOURCE}." if is_incomplete else ""
    return Rejection("InvalidSpec", f"{error}{hint}", is_retried=is_incomplete)


def _read_stored_job(cluster: "Cluster", seen: Observation) -> TransferJob | None:
    """Read the spec that the run started with, if the TransferJob has not changed since."""
    run = seen.previous.run
    config_map = cluster.get("ConfigMap", run) if run and seen.is_settled else None
    if config_map is None or get_annotation(config_map, GENERATION_ANNOTATION) != str(seen.generation):
        return None
    try:
        text = (config_map.get("data") or {}).get(JOB_FILE, "")
        job = read_bytes(text.encode(), JOB_FILE)[0]
    except SpecError:  # of another version of topwork, or edited
        return None
    # Labels change without a new generation.
    labels = seen.transfer_job["metadata"].get("labels") or {}
    return job.model_copy(update={"metadata": job.metadata.model_copy(update={"labels": labels})}).as_run(str(run))


def _render(job: TransferJob, seen: Observation, namespace_image: str | None) -> Target:
    previous, is_same_run = seen.previous, seen.previous.run == job.run
    if seen.is_suspended:
        return Target(job.run)
    image = namespace_image
    # An image without GPU support can't be kept if the run now uses GPUs.
    if is_same_run and previous.image and not (job.spec.compute.gpus and previous.image.endswith("-cpu")):
        image = previous.image
    has_started = is_same_run and previous.start_time is not None
    options = RenderOptions(
        job.spec.compute.image or image,
        namespace=seen.namespace,
        dataset=get_annotation(seen.transfer_job, DATASET_ANNOTATION) or "",
        selected_run=get_annotation(seen.transfer_job, SELECTED_RUN_ANNOTATION) or "",
        restart=get_annotation(seen.transfer_job, RESTART_ANNOTATION) == "true" and not has_started,
    )
    return Target(job.run, build_run_objects(job, seen.transfer_job, options))


def _check_names(cluster: "Cluster", target: Target, seen: Observation) -> Target | Rejection:
    """Look for objects of others with the names of the run."""
    if target.objects is None or seen.own_job(target.run):
        return target
    unowned = None
    if (job := cluster.get("Job", target.run)) and not seen.is_of_earlier_transfer_job(job):
        if get_label(job, PART_OF_LABEL) != APP_NAME or get_controller(job):
            return _name_conflict(job, seen)
        unowned = job
    config_map = cluster.get("ConfigMap", name_of(target.objects.config_map))
    if config_map and get_label(config_map, PART_OF_LABEL) != APP_NAME:
        return _name_conflict(config_map, seen)
    is_stale = config_map is not None and seen.is_of_earlier_transfer_job(config_map)
    uid = config_map["metadata"]["uid"] if config_map and is_stale else None
    network = read_network(cluster, target.run) if target.objects.network or _had_nodes(seen) else []
    if foreign := next((obj for obj in network if get_label(obj, PART_OF_LABEL) != APP_NAME), None):
        return _name_conflict(foreign, seen)
    is_obsolete = not target.objects.network
    stale = tuple(obj for obj in network if is_obsolete or seen.is_of_earlier_transfer_job(obj))
    return Target(target.run, target.objects, unowned, uid, stale)


def _had_nodes(seen: Observation) -> bool:
    """Return whether the run had several nodes before."""
    return any(record.index is not None for record in seen.previous.attempt_history)


def _name_conflict(obj: KubernetesObject, seen: Observation) -> Rejection:
    owner = get_controller(obj)
    belongs = f"belongs to {owner['kind']} {owner['name']}" if owner else "was not created by topwork"
    message = f"{kubectl_name(obj)} in namespace {seen.namespace} {belongs}. Delete it, or change metadata.name."
    return Rejection("NameConflict", message, is_retried=True)
