"""`topwork submit`: run job specs in a Kubernetes cluster."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.commands.render import RenderedJob, read_and_render
from topwork.cli.options import Context, Image, Kubeconfig, Namespace, Overrides, format_overrides, open_cluster
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.cli.output.follow import ConnectionOptions
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.manifests.defaults import NamespaceDefaults
    from topwork.cluster.operations.submit import Outcome


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
    dry_run: Annotated[
        DryRun | None,
        typer.Option(
            help="client: print what would be applied, without a connection: without the defaults of the namespace, "
            "and under the name that depends on the spec only; server: check the source, and let the API server "
            "validate it."
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Follow the runs until they are finished; exit with their exit code."),
    ] = False,
    wait_for_data: Annotated[
        bool,
        typer.Option(
            "--wait-for-data", help="Pull the dataset before requesting GPUs (requires spec.compute.prefetch)."
        ),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Replace a finished Job, and delete the results of the run first, as in run."),
    ] = False,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Use the dataset of the latest version, even if its source has changed.")
    ] = False,
) -> None:
    """Run job specs in the cluster; an existing run is left unchanged, and a failed run resumes.

    If the storage is configured here, the source is checked: if images were added, changed or removed, the job is a new
    run on them. Otherwise, its pods check the source. Stages with the same settings and data are shared by all runs.

    The ConfigMap topwork-defaults of the namespace, if there is one, provides values that a spec does not set. If any
    file is invalid, nothing is applied. With --follow, the exit code is that of the first run that did not succeed:
    2 spec, data or setting is wrong; 3 a gate was not met; 75 storage or the network failed, or the deadline was
    exceeded; 143 the Job was deleted; 130 after Ctrl-C, which does not stop the runs.
    """
    if dry_run and (follow or wait_for_data):
        raise SettingError("--dry-run can't be combined with --follow or --wait-for-data: it starts no runs.")
    if dry_run is DryRun.client:
        from topwork.spec.yaml_output import dump_yaml

        if pinned:
            raise SettingError("--dry-run=client can't be combined with --pinned: it does not read storage.")
        jobs = _render(files, RenderOptions(image, namespace, restart=restart), overrides or (), wait_for_data)
        sys.stdout.write(dump_yaml([obj for job in jobs for obj in job.rendered.objects]))
        return
    try:
        cluster = open_cluster(namespace, context, kubeconfig)
    except SettingError:
        # Report problems of the files first.
        _render(files, RenderOptions(image, namespace), overrides or (), wait_for_data)
        raise
    defaults = _read_defaults(cluster)
    options = RenderOptions(image or (defaults.image if defaults else None), namespace, restart=restart)
    jobs = _render(files, options, overrides or (), wait_for_data, defaults)
    if defaults:
        _print_used_defaults(defaults, with_image=image is None)
    jobs = [_select_dataset(job, options, pinned=pinned) for job in jobs]
    if dry_run is DryRun.server:
        for job in jobs:
            _validate_on_server(cluster, job, restart=restart)
        return
    from topwork.cli.output.follow import ConnectionOptions

    flags = (f"--image {image}" if image else "", "--pinned" if pinned else "", "--restart" if restart else "")
    submitter = _Submitter(
        cluster, ConnectionOptions(cluster.namespace, context, kubeconfig), restart, tuple(filter(None, flags))
    )
    if code := submitter.submit_all(jobs, follow=follow, wait_for_data=wait_for_data):
        raise typer.Exit(code)


def _render(
    files: list[Path],
    options: RenderOptions,
    overrides: Sequence[str],
    wait_for_data: bool,
    defaults: "NamespaceDefaults | None" = None,
) -> list[RenderedJob]:
    """Read and render all jobs, before anything is applied."""
    jobs = read_and_render(files, options, overrides, defaults.spec if defaults else None)
    for job in jobs:
        if wait_for_data and job.rendered.prefetch is None:
            raise SettingError(f"--wait-for-data requires spec.compute.prefetch: true, which {job.path} does not set.")
    return jobs


def _select_dataset(job: RenderedJob, options: RenderOptions, *, pinned: bool) -> RenderedJob:
    """Check the source of a job, and render it again under the name of its run on that dataset."""
    from topwork.cli.source_check import check_source

    source = check_source(job.job, pinned=pinned)
    if source.changes:
        name = job.job.metadata.name
        print(f"transferjob {name}: source changed: {source.changes}; --pinned keeps the previous dataset")
    named = job.job.as_run(source.run)
    rendered = render(named, replace(options, dataset=source.dataset if pinned else ""))
    return job._replace(job=named, rendered=rendered, unchecked=source.unchecked)


def _read_defaults(cluster: "Cluster") -> "NamespaceDefaults | None":
    """Read the defaults of the namespace; an account that may not read them submits without them."""
    from topwork.clients.kubernetes.errors import ForbiddenError
    from topwork.cluster.manifests.defaults import DEFAULTS_SOURCE, read_defaults

    try:
        return read_defaults(cluster)
    except ForbiddenError as error:
        print(f"Note: {DEFAULTS_SOURCE} is ignored: {error}", file=sys.stderr)
        return None


def _print_used_defaults(defaults: "NamespaceDefaults", *, with_image: bool) -> None:
    """Print the values that come from the defaults of the namespace."""
    from topwork.cluster.manifests.defaults import DEFAULTS_SOURCE
    from topwork.spec.loading.problems import format_path
    from topwork.spec.messages import format_value

    used = [f"image {defaults.image}"] if defaults.image and with_image else []
    for path, value in defaults.spec.values.items():
        if path in defaults.spec.used:
            used.append(f"{format_path(path)} {format_value(value)}")
    if used:
        print(f"from {DEFAULTS_SOURCE}: {', '.join(used)}")


@dataclass(frozen=True)
class _Submitter:
    """Submits jobs with the same options.

    Attributes:
        cluster: The cluster.
        connection: The options that selected it.
        restart: Whether to replace complete Jobs, too.
        options: The options that change what is submitted, to repeat them in commands that are shown to the user.
    """

    cluster: "Cluster"
    connection: "ConnectionOptions"
    restart: bool
    options: tuple[str, ...]

    def submit_all(self, jobs: list[RenderedJob], *, follow: bool, wait_for_data: bool) -> int:
        """Submit all jobs, then wait for their data and follow them, one after the other."""
        from topwork.cli.output import follow as following

        codes = []
        outcomes = [self._submit(job, prefetch_only=wait_for_data, restart=self.restart) for job in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            code = 0
            if wait_for_data and outcome in {"submitted", "replaced"}:
                code = self._wait_for_data(job)
                if code == 0:
                    self._submit(job)
            if follow and code == 0:
                print(f"following {job.job.run}; press Ctrl-C to leave it running", flush=True)
                code = following.follow(self.cluster, job.job.run, self.connection)
            codes.append(code)
            if code == following.INTERRUPTED:
                break
        if not follow and not wait_for_data:
            for job, outcome in zip(jobs, outcomes, strict=True):
                if outcome != "complete":
                    print(f"  follow  {self.connection.command(f'status {job.job.run}', '--follow')}")
                    print(f"  logs    {self.connection.command(f'logs {job.job.run}', '-f')}")
        return next((code for code in codes if code), 0)

    def _submit(self, job: RenderedJob, *, prefetch_only: bool = False, restart: bool = False) -> "Outcome":
        """Submit a job and print the outcome."""
        from topwork.cluster.operations.submit import Submission

        known_warnings = len(self.cluster.warnings)
        outcome = Submission(self.cluster, job.rendered, print).submit(prefetch_only=prefetch_only, restart=restart)
        _print_unchecked_source(job, outcome, self.connection)
        for warning in self.cluster.warnings[known_warnings:]:
            print(f"Warning: {warning}", file=sys.stderr)
        run, name, namespace = job.job.run, job.job.metadata.name, self.cluster.namespace
        if outcome == "running":
            print(f"transferjob {name} unchanged: job.batch/{run} in namespace {namespace} already exists")
        elif outcome == "complete":
            print(f"transferjob {name} unchanged: job.batch/{run} in namespace {namespace} is complete")
            if model := _read_model_uri(self.cluster, run):
                print(f"  model  {model}")
        elif prefetch_only:
            print(f"transferjob {name} pulls its dataset as job.batch/{run}-pull in namespace {namespace}")
        else:
            print(f"transferjob {name} submitted as job.batch/{run} in namespace {namespace}")
            if job.rendered.prefetch:
                print(f"  job.batch/{run}-pull pulls its dataset")
        return outcome

    def _wait_for_data(self, job: RenderedJob) -> int:
        """Follow the prefetch Job to its end; return its exit code."""
        from topwork.cli.output import follow as following

        code = following.follow(self.cluster, job.job.run, self.connection, "prefetch")
        if code:
            options = (*format_overrides(job.overrides), *self.options, "--wait-for-data")
            command = self.connection.command(f"submit {job.path}", *options)
            print(f"transferjob {job.job.metadata.name} is not submitted yet. Continue with: {command}")
        return code


def _print_unchecked_source(job: RenderedJob, outcome: "Outcome", connection: "ConnectionOptions") -> None:
    """Say that this command did not check the source, and whether a pod does."""
    if not job.unchecked:
        return
    if outcome != "complete":
        print(f"Note: the pod checks the source, not this command: {job.unchecked}", file=sys.stderr)
        return
    print(
        f"Note: the source was not checked, and images may have changed since {job.job.run} was complete: "
        f"{job.unchecked}. To let a pod check it, submit again after: {connection.command(f'cancel {job.job.run}')}",
        file=sys.stderr,
    )


def _read_model_uri(cluster: "Cluster", run: str) -> str | None:
    from topwork.cluster.operations.runs import read_run_objects
    from topwork.cluster.status.run_status import read_run_status

    objects = read_run_objects(cluster, run)
    return read_run_status(objects).model if objects.jobs else None


def _validate_on_server(cluster: "Cluster", job: RenderedJob, *, restart: bool) -> None:
    """Let the API server validate what would be applied."""
    from topwork.cluster.operations.submit import Submission
    from topwork.cluster.status.objects import kubectl_name

    existing, outcome = Submission(cluster, job.rendered, print).preview(restart=restart)
    if existing is not None and outcome:
        print(f"{kubectl_name(existing)} unchanged, {outcome} (server dry run)")
        return
    if existing is not None:
        cause = "is finished" if restart else "has failed"
        print(f"{kubectl_name(existing)} would be replaced: it {cause} or is being deleted (server dry run)")
        return
    for obj in job.rendered.objects:
        cluster.apply(obj, dry_run=True)
        print(f"{kubectl_name(obj)} serverside-applied (server dry run)")
