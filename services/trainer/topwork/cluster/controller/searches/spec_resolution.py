"""What a TransferSearch asks for: its validated spec with namespace defaults, as it was when the search started."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from topwork.clients.kubernetes import KubernetesObject
from topwork.cluster.controller.run_objects import owner_reference
from topwork.cluster.controller.searches.observation import SearchObservation
from topwork.cluster.controller.spec_resolution import Rejection, RejectionReason
from topwork.cluster.manifests.defaults import DEFAULTS_SOURCE, read_defaults
from topwork.cluster.manifests.transfer_search import build_transfer_search, parse_transfer_search
from topwork.cluster.names import (
    APP_NAME,
    GENERATION_ANNOTATION,
    PART_OF_LABEL,
    SEARCH_FILE,
)
from topwork.cluster.status.objects import get_annotation, kubectl_name
from topwork.errors import SettingError, SpecError
from topwork.search.jobs import SEARCH_LABEL
from topwork.search.search_id import search_id
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.loading.yaml_document import read_documents
from topwork.spec.search import TransferSearch
from topwork.spec.yaml_output import dump_yaml

if TYPE_CHECKING:
    from topwork.clients.kubernetes.cluster import Cluster


@dataclass(frozen=True)
class SearchTarget:
    """The search that a TransferSearch asks for.

    Attributes:
        id: ID of the search.
        search: Its spec with the defaults of the namespace.
        config_map: Name of the ConfigMap with its spec and its journal.
    """

    id: str
    search: TransferSearch
    config_map: str


def resolve(cluster: "Cluster", seen: SearchObservation) -> SearchTarget | Rejection:
    """Find out what a TransferSearch asks for, and store it.

    A search that was accepted keeps its stored spec, whatever the defaults of the namespace are now: otherwise, its
    trials could not be compared.

    Args:
        cluster: The cluster, with the namespace of the TransferSearch.
        seen: The TransferSearch.

    Returns:
        The search, or why the TransferSearch is not accepted.

    Raises:
        UnavailableError: If the API server does not respond.
    """
    if stored := _read_stored(cluster, seen):
        return stored
    try:
        defaults = read_defaults(cluster)
    except SettingError as error:
        return Rejection("InvalidDefaults", str(error), is_retried=True)
    try:
        search = parse_transfer_search(seen.search, defaults.spec if defaults else None)
    except SpecError as error:
        return _reject(error, seen)
    target = _target(_with_image(search, defaults.image if defaults else None))
    return _store(cluster, seen, target) or target


def _target(search: TransferSearch) -> SearchTarget:
    identity = search_id(search)
    return SearchTarget(identity, search, config_map_name(identity))


def config_map_name(identity: str) -> str:
    """Return the name of the ConfigMap with the spec and the journal of a search.

    Args:
        identity: ID of the search.
    """
    return f"{identity}-journal"


def _with_image(search: TransferSearch, image: str | None) -> TransferSearch:
    """Keep the image of the namespace for all trials."""
    template = search.spec.template
    if image is None or template.compute.image:
        return search
    compute = template.compute.model_copy(update={"image": image})
    template = template.model_copy(update={"compute": compute})
    return search.model_copy(update={"spec": search.spec.model_copy(update={"template": template})})


def _read_stored(cluster: "Cluster", seen: SearchObservation) -> SearchTarget | None:
    """Read the spec that was accepted, if the TransferSearch has not changed since."""
    if not seen.is_accepted or not seen.previous.search:
        return None
    config_map = cluster.get("ConfigMap", config_map_name(seen.previous.search))
    if config_map is None or get_annotation(config_map, GENERATION_ANNOTATION) != str(seen.generation):
        return None
    target = read_target(config_map, seen.search)
    return target if target and target.id == seen.previous.search else None


def read_target(config_map: KubernetesObject, obj: KubernetesObject) -> SearchTarget | None:
    """Read the search that the ConfigMap of a TransferSearch contains.

    Args:
        config_map: The ConfigMap with the spec and the journal.
        obj: The TransferSearch, whose labels are those of the search.

    Returns:
        The search; None if another version of topwork wrote it in a form that this one rejects, or it was edited.
    """
    text = (config_map.get("data") or {}).get(SEARCH_FILE, "")
    try:
        search = parse_transfer_search(next(iter(read_documents(text))).data)
    except (SpecError, StopIteration):
        return None
    metadata = search.metadata.model_copy(update={"labels": obj["metadata"].get("labels") or {}})
    return _target(search.model_copy(update={"metadata": metadata}))


def _store(cluster: "Cluster", seen: SearchObservation, target: SearchTarget) -> Rejection | None:
    """Store the spec of a search next to its journal, unless the ConfigMap belongs to others."""
    existing = cluster.get("ConfigMap", target.config_map)
    text = dump_yaml([build_transfer_search(target.search, seen.namespace)])
    annotations = {GENERATION_ANNOTATION: str(seen.generation)}
    if existing is None:
        cluster.create(_config_map(seen, target, text, annotations))
    elif not seen.owns(existing):
        hint = "Delete it, or wait until it is deleted, if it belongs to a deleted search."
        message = f"{kubectl_name(existing)} in namespace {seen.namespace} does not belong to this search. {hint}"
        return Rejection("NameConflict", message, is_retried=True)
    else:
        metadata = existing["metadata"]
        annotations = (metadata.get("annotations") or {}) | annotations
        data = (existing.get("data") or {}) | {SEARCH_FILE: text}
        cluster.replace(existing | {"metadata": metadata | {"annotations": annotations}, "data": data})
    return None


def _config_map(
    seen: SearchObservation, target: SearchTarget, text: str, annotations: dict[str, str]
) -> KubernetesObject:
    labels = {"app.kubernetes.io/name": APP_NAME, PART_OF_LABEL: APP_NAME, SEARCH_LABEL: target.id}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": target.config_map,
            "namespace": seen.namespace,
            "labels": (seen.search["metadata"].get("labels") or {}) | labels,
            "annotations": annotations,
            "ownerReferences": [owner_reference(seen.search)],
        },
        "data": {SEARCH_FILE: text},
    }


def _reject(error: SpecError, seen: SearchObservation) -> Rejection:
    reason: RejectionReason = "InvalidSpec"
    if isinstance(error, InvalidSpecError) and any(problem.file == DEFAULTS_SOURCE for problem in error.problems):
        reason = "InvalidDefaults"
    # The ConfigMap with the defaults may be created after the TransferSearch.
    is_incomplete = "storage" not in ((seen.search.get("spec") or {}).get("template") or {})
    hint = f"\nThe namespace can also set spec.template.storage: in {DEFAULTS_SOURCE}." if is_incomplete else ""
    return Rejection(reason, f"{error}{hint}", is_retried=is_incomplete or reason == "InvalidDefaults")
