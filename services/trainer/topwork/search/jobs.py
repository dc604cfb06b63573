"""The jobs of a search: those of its trials, and the one that publishes the best trial."""

from collections.abc import Mapping
from typing import Any

from topwork.search.rungs import rung_epochs
from topwork.search.search_id import search_id
from topwork.spec import TransferJob
from topwork.spec.digest import DIGEST_LENGTH, digest_of, training_content
from topwork.spec.evaluation import Evaluate, Publish
from topwork.spec.job import JobSpec
from topwork.spec.loading.problems import InvalidSpecError
from topwork.spec.search import TransferSearch
from topwork.spec.search.space import last_stage, trial_spec

SEARCH_LABEL = "topwork.dev/search"
"""Label of the jobs of a search: the id of the search."""
TRIAL_LABEL = "topwork.dev/trial"
"""Label of the job of a trial: the number of the trial."""
MAX_NAME_LENGTH = 40
"""Limit of `metadata.name` of a TransferJob."""


def trial_name(search: TransferSearch, suffix: str) -> str:
    """Return the name of a job of a search: the name of the search and a suffix.

    Args:
        search: The search.
        suffix: Number of the trial, or another short word.

    Returns:
        A DNS label. A long name of a search is cut, and keeps hex digits that tell it from similar names.
    """
    name = search.metadata.name
    if len(name) + 1 + len(suffix) > MAX_NAME_LENGTH:
        digits = digest_of(name)[:6]
        name = f"{name[: MAX_NAME_LENGTH - len(suffix) - len(digits) - 2].rstrip('-')}-{digits}"
    return f"{name}-{suffix}"


def model_name(search: TransferSearch) -> str:
    """Return the name of the model that a search publishes."""
    return search.spec.template.publish.name or search.metadata.name


def max_epochs(spec: JobSpec) -> int:
    """Return the number of epochs of the last training stage of a spec."""
    return spec.transfer.epochs if spec.fine_tune is None else spec.fine_tune.max_epochs


def first_epochs(search: TransferSearch, params: Mapping[str, Any]) -> int:
    """Return the number of epochs that a new trial trains before it is compared.

    A rung that its spec refuses is skipped, such as one that ends before the last step of its learning rate.

    Args:
        search: The search.
        params: Parameters of the trial, which its spec accepts with all epochs.

    Returns:
        Number of epochs of the last training stage.
    """
    *rungs, complete = rung_epochs(search.spec.pruner, max_epochs(trial_spec(search, params)))
    for epochs in rungs:
        try:
            _spec_with_epochs(search, params, epochs)
        except InvalidSpecError:
            continue
        return epochs
    return complete


def training_digest(spec: JobSpec) -> str:
    """Return a digest that trials with the same training share, although their parameters are written differently."""
    return digest_of(training_content(spec))[:DIGEST_LENGTH]


def trial_job(search: TransferSearch, number: int, params: Mapping[str, Any], epochs: int) -> TransferJob:
    """Return the job of a run of a trial. It publishes nothing, and has no gates.

    Args:
        search: The search.
        number: Number of the trial.
        params: Parameters of the trial.
        epochs: Number of epochs of the last training stage.

    Raises:
        InvalidSpecError: If the spec refuses the parameters.
    """
    full = trial_spec(search, params)
    is_complete = search.spec.pruner == "none" or epochs >= max_epochs(full)
    spec = full if is_complete else _spec_with_epochs(search, params, epochs)
    changes = {
        # The name decides which pinned test set and which MLflow experiment belong to the trial.
        "publish": Publish(enabled=False, name=model_name(search)),
        "evaluate": Evaluate(metrics=spec.evaluate.metrics),
        "compute": spec.compute.model_copy(update={"keep_checkpoint": not is_complete}),
    }
    return _job(search, trial_name(search, str(number)), spec.model_copy(update=changes), {TRIAL_LABEL: str(number)})


def best_job(search: TransferSearch, params: Mapping[str, Any]) -> TransferJob:
    """Return the job that publishes the best trial: the template with its parameters.

    Its model has the name of the search unless the template sets another one. The name of the job does not matter:
    stages are found by their keys.
    """
    spec = trial_spec(search, params)
    publish = spec.publish.model_copy(update={"name": model_name(search)})
    return _job(search, search.metadata.name, spec.model_copy(update={"publish": publish}), {})


def template_job(search: TransferSearch) -> TransferJob:
    """Return the template of a search as a job with the labels of the search."""
    return _job(search, search.metadata.name, search.spec.template, {})


def _spec_with_epochs(search: TransferSearch, params: Mapping[str, Any], epochs: int) -> JobSpec:
    return trial_spec(search, {**params, f"{last_stage(search.spec.template)}.epochs": epochs})


def _job(search: TransferSearch, name: str, spec: JobSpec, labels: dict[str, str]) -> TransferJob:
    all_labels = search.metadata.labels | {SEARCH_LABEL: search_id(search)} | labels
    metadata = search.metadata.model_copy(update={"name": name, "labels": all_labels})
    return TransferJob(api_version=search.api_version, kind="TransferJob", metadata=metadata, spec=spec)
