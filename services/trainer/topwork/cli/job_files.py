"""Reading specs from files for a cluster, and rendering jobs, before anything is applied."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from topwork.cluster.manifests.render import RenderedObjects, RenderOptions, render
from topwork.cluster.names import RunKind
from topwork.cluster.operations.namespace_defaults import DefaultsByNamespace
from topwork.errors import SpecError
from topwork.spec import TransferJob
from topwork.spec.loading.loader import STANDARD_INPUT, STANDARD_INPUT_NAME, Spec, read_files, read_specs
from topwork.spec.loading.problems import InvalidSpecError, Problem
from topwork.spec.loading.yaml_document import Path as SpecPath
from topwork.spec.search import TransferSearch

SAME_RUN = (
    "is the same run, {run}, as {first}: the two specs differ only in keys that do not affect the result. Remove one "
    "of them, or change metadata.name."
)
SAME_NAME = (
    "has the same name as {first}, so one TransferJob would replace the other. Remove one, or change metadata.name."
)
SAME_SEARCH = "has the same name as the search of {first}. Remove one of them, or change metadata.name."
OTHER_NAMESPACE = (
    "metadata.namespace is {found}, but --namespace is {requested}. Remove one of them: a file is submitted to the "
    "namespace that it names."
)


class RenderedJob(NamedTuple):
    """A job, its file, and its rendered objects.

    Attributes:
        path: The file.
        job: The job.
        rendered: Its objects as a plain Job.
        options: The options with which they were rendered, with the namespace of the job.
        overrides: The overrides that were applied to the file.
        filled: Paths of values that come from the defaults of the namespace.
    """

    path: Path
    job: TransferJob
    rendered: RenderedObjects
    options: RenderOptions
    overrides: tuple[str, ...] = ()
    filled: frozenset[SpecPath] = frozenset()


class SearchSpecFile(NamedTuple):
    """A search and its file.

    Attributes:
        path: The file.
        search: The search.
        namespace: Its namespace; None for that of the connection.
        filled: Paths of values that come from the defaults of the namespace.
    """

    path: Path
    search: TransferSearch
    namespace: str | None
    filled: frozenset[SpecPath]


class ClusterSpecs(NamedTuple):
    """The jobs and searches of some files, in file order.

    Attributes:
        jobs: The jobs, each with a different run.
        searches: The searches.
    """

    jobs: list[RenderedJob]
    searches: list[SearchSpecFile]


def read_and_render(
    files: Sequence[Path],
    options: RenderOptions,
    overrides: Sequence[str] = (),
    defaults: DefaultsByNamespace | None = None,
    *,
    kind: RunKind = RunKind.job,
    with_searches: bool = False,
) -> ClusterSpecs:
    """Read all jobs and searches of some files, and render the jobs.

    Args:
        files: Specs; `-` is standard input.
        options: Image and namespace.
        overrides: `PATH=VALUE` items that apply to all specs.
        defaults: Defaults of the namespaces.
        kind: What the jobs are submitted as. A TransferJob may be suspended, and is identified by its name.
        with_searches: Whether the files may contain searches.

    Returns:
        The jobs and searches.

    Raises:
        InvalidSpecError: If a file has problems; lists all problems of all files.
    """
    specs = ClusterSpecs([], [])
    problems: list[Problem] = []
    file_of_job: dict[tuple[str | None, str], str] = {}
    read: Sequence[tuple[Path, Spec]] = (read_specs if with_searches else read_files)(files, overrides, defaults)
    documents = [spec for _, spec in read]
    filled = defaults.filled_paths(overrides, documents) if defaults else [frozenset[SpecPath]()] * len(read)
    for (path, job), paths in zip(read, filled, strict=True):
        name = STANDARD_INPUT_NAME if path == STANDARD_INPUT else str(path)
        namespace = options.namespace or job.metadata.namespace
        if job.metadata.namespace not in {None, namespace}:
            message = OTHER_NAMESPACE.format(found=job.metadata.namespace, requested=namespace)
            problems.append(Problem(name, 0, 0, "", message))
        if isinstance(job, TransferSearch):
            if first := file_of_job.get((namespace, f"search {job.metadata.name}")):
                problems.append(Problem(name, 0, 0, "", SAME_SEARCH.format(first=first)))
            file_of_job[namespace, f"search {job.metadata.name}"] = name
            specs.searches.append(SearchSpecFile(path, job, namespace, paths))
            continue
        job_options = replace(
            options, namespace=namespace, default_image=defaults.image_of(namespace) if defaults else None
        )
        try:
            rendered = render(_without_suspend(job) if kind is RunKind.transferjob else job, job_options)
            specs.jobs.append(RenderedJob(path, job, rendered, job_options, tuple(overrides), paths))
        except SpecError as error:
            problems += [Problem(name, 0, 0, "", line) for line in str(error).splitlines()]
        for key, text in ((job.run, SAME_RUN), (job.metadata.name, SAME_NAME)):
            if (first := file_of_job.get((namespace, key))) and (text is SAME_RUN or kind is RunKind.transferjob):
                problems.append(Problem(name, 0, 0, "", text.format(run=job.run, first=first)))
                break
        file_of_job |= {(namespace, job.run): name, (namespace, job.metadata.name): name}
    if problems:
        raise InvalidSpecError(tuple(problems))
    return specs


def _without_suspend(job: TransferJob) -> TransferJob:
    return job.model_copy(update={"spec": job.spec.model_copy(update={"suspend": False})})
