"""`topwork submit`: run job specs in a Kubernetes cluster."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.job_files import ClusterSpecs, RenderedJob, read_and_render
from topwork.cli.options import As, Context, Image, Kubeconfig, Namespace, Overrides, open_cluster
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.names import RunKind
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.cli.submission import CheckedJob, Submitter
    from topwork.cluster.operations.namespace_defaults import DefaultsByNamespace


class DryRun(StrEnum):
    """Where objects are checked without being stored."""

    client = "client"
    server = "server"


def submit(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job specs; - reads standard input.")],
    overrides: Overrides = None,
    image: Image = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
    as_kind: As = None,
    dry_run: Annotated[
        DryRun | None,
        typer.Option(
            help="client: print what would be applied, without a connection: without the defaults of the namespace, "
            "under the name that depends on the spec only, and as plain Jobs unless --as transferjob; server: check "
            "the source, and let the API server validate it."
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Follow the runs until they are finished; exit with their exit code."),
    ] = False,
    wait_for_data: Annotated[
        bool,
        typer.Option(
            "--wait-for-data",
            help="Pull the dataset before requesting GPUs (requires spec.compute.prefetch and --as job).",
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Replace a finished run, and delete the results of the run first, as in run."),
    ] = False,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Use the dataset of the latest version, even if its source has changed.")
    ] = False,
) -> None:
    """Run job specs in the cluster; an existing run is left unchanged, and a failed or canceled run resumes.

    Where the cluster serves TransferJobs, one is applied for each spec, and the controller runs it; a TransferJob that
    is not finished is changed: the controller stops its run with a checkpoint and starts the new one. Elsewhere, and
    with --as job, a ConfigMap and plain Jobs are applied.

    If the storage is configured here, the source is checked: if images were added, changed or removed, the job is a new
    run on them. Otherwise, its pods check the source. Stages with the same settings and data are shared by all runs.

    The ConfigMap topwork-defaults of the namespace, if there is one, provides values that a spec does not set. If any
    file is invalid, nothing is applied. With --follow, the exit code is that of the first run that did not succeed:
    2 spec, data or setting is wrong; 3 a gate was not met; 75 storage or the network failed, or the deadline was
    exceeded; 143 the run was canceled; 130 after Ctrl-C, which does not stop the runs.

    A TransferSearch requires the controller, which runs each of its trials as a TransferJob and publishes the best one.
    A changed one continues if only trials, parallel, budget, gates or compute were changed; otherwise it starts over.
    """
    if dry_run and (follow or wait_for_data):
        raise SettingError("--dry-run can't be combined with --follow or --wait-for-data: it starts no runs.")
    options = RenderOptions(image, namespace, restart=restart)
    if dry_run is DryRun.client:
        if pinned:
            raise SettingError("--dry-run=client can't be combined with --pinned: it does not read storage.")
        kind = as_kind or RunKind.job
        _print_objects(_read(files, options, overrides or (), kind, wait_for_data=wait_for_data), kind, image)
        return
    try:
        cluster = open_cluster(namespace, context, kubeconfig)
    except SettingError:
        # Report problems of the files first.
        _read(files, options, overrides or (), as_kind or RunKind.job, wait_for_data=wait_for_data)
        raise
    from topwork.cli.output.follow import ConnectionOptions
    from topwork.cli.search_submission import SearchSubmitter
    from topwork.cli.submission import JobSubmitter, TransferJobSubmitter
    from topwork.cluster.operations.namespace_defaults import DefaultsByNamespace
    from topwork.cluster.operations.transfer_jobs import choose_run_kind

    kind = choose_run_kind(cluster, as_kind)
    defaults = DefaultsByNamespace(cluster, namespace, lambda note: print(f"Note: {note}", file=sys.stderr))
    specs = _read(files, options, overrides or (), kind, defaults, wait_for_data=wait_for_data)
    if specs.searches:
        _check_search_options(kind, restart=restart, pinned=pinned)
    for line in defaults.describe_used(with_image=image is None):
        print(line)
    flags = (f"--image {image}" if image else "", "--pinned" if pinned else "", "--restart" if restart else "")
    connection = ConnectionOptions(cluster.namespace, context, kubeconfig)
    common = (cluster, connection, restart, tuple(filter(None, flags)))
    submitter: Submitter = (
        TransferJobSubmitter(*common, pinned=pinned)
        if kind is RunKind.transferjob
        else JobSubmitter(*common, wait_for_data=wait_for_data)
    )
    searches = SearchSubmitter(cluster, connection, image)
    checked = [_check_source(job, kind, defaults, pinned=pinned) for job in specs.jobs]
    if dry_run is DryRun.server:
        submitter.validate_all(checked)
        searches.validate_all(specs.searches)
    elif code := submitter.submit_all(checked, follow=follow) or searches.submit_all(specs.searches, follow=follow):
        raise typer.Exit(code)


def _read(
    files: list[Path],
    options: RenderOptions,
    overrides: Sequence[str],
    kind: RunKind,
    defaults: "DefaultsByNamespace | None" = None,
    *,
    wait_for_data: bool,
) -> ClusterSpecs:
    """Read all specs, and render all jobs, before anything is applied."""
    specs = read_and_render(files, options, overrides, defaults, kind=kind, with_searches=True)
    if wait_for_data and kind is RunKind.transferjob:
        raise SettingError(
            "--wait-for-data requires --as job. With spec.compute.prefetch: true, the dataset of a TransferJob is "
            "pulled while it waits for GPUs."
        )
    for job in specs.jobs:
        if wait_for_data and job.rendered.prefetch is None:
            raise SettingError(f"--wait-for-data requires spec.compute.prefetch: true, which {job.path} does not set.")
    return specs


def _check_search_options(kind: RunKind, *, restart: bool, pinned: bool) -> None:
    if kind is RunKind.job:
        raise SettingError(
            "A TransferSearch needs a cluster with the controller, which runs its trials as TransferJobs. To run it on "
            "this machine, use: topwork search FILE."
        )
    if restart or pinned:
        option = "--restart" if restart else "--pinned"
        raise SettingError(f"{option} applies to jobs only. A search with another seed starts over.")


def _print_objects(specs: ClusterSpecs, kind: RunKind, image: str | None) -> None:
    from topwork.cli.search_submission import build_search
    from topwork.cluster.operations.submit_transfer_job import build_object
    from topwork.spec.yaml_output import dump_yaml

    if kind is RunKind.job:
        objects = [obj for job in specs.jobs for obj in job.rendered.objects]
    else:
        objects = [build_object(job.job, job.options) for job in specs.jobs]
    objects += [build_search(file, image) for file in specs.searches]
    sys.stdout.write(dump_yaml(objects))


def _check_source(job: RenderedJob, kind: RunKind, defaults: "DefaultsByNamespace", *, pinned: bool) -> "CheckedJob":
    """Check the source of a job. A plain Job is rendered again under the name of its run on that dataset."""
    from topwork.cli.source_check import check_source
    from topwork.cli.submission import CheckedJob, describe_changed_source

    namespace_defaults = defaults.of(job.options.namespace)
    spec_defaults = namespace_defaults.spec if namespace_defaults else None
    checked = CheckedJob(job, check_source(job.job, pinned=pinned), spec_defaults)
    if kind is RunKind.transferjob:
        return checked
    source = checked.source
    if source.changes:
        print(describe_changed_source(checked))
    named = job.job.as_run(source.run)
    rendered = render(named, replace(job.options, dataset=source.dataset if pinned else ""))
    return checked._replace(rendered=job._replace(job=named, rendered=rendered))
