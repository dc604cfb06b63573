"""`topwork submit`: run job specs in a Kubernetes cluster."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from topwork.cli.commands.render import RenderedJob, read_and_render
from topwork.cli.options import Context, Image, Kubeconfig, Namespace, Overrides, as_options, open_cluster
from topwork.cluster.manifests.render import Placement
from topwork.errors import SettingError

if TYPE_CHECKING:
    from topwork.cli.output.follow import Where
    from topwork.clients.kubernetes.cluster import Cluster
    from topwork.cluster.manifests.defaults import Defaults
    from topwork.cluster.operations.submit import Outcome


class DryRun(StrEnum):
    """How much is tried without anything being changed."""

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
            help="client prints what would be applied, without the namespace's defaults; server lets the API server "
            "check it."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Show the runs until they are over; ends with their exit code.")
    ] = False,
    wait_for_data: Annotated[
        bool,
        typer.Option("--wait-for-data", help="Pull first, and take GPUs when all is there (spec.compute.prefetch)."),
    ] = False,
) -> None:
    """Run job specs in the cluster; one that is there already is left alone, one that failed goes on.

    What a spec does not say comes from the ConfigMap topwork-defaults of the namespace, where there is one. Nothing
    is applied if one of the files is wrong. Exit codes with --follow: that of the first run that is not 0:
    2 spec, data or setting wrong, 3 a gate was not met, 75 storage or the network failed, or the deadline was over,
    143 the Job was deleted; 130 after Ctrl-C, which leaves the runs alone.
    """
    if dry_run and (follow or wait_for_data):
        raise SettingError("--dry-run starts nothing that --follow or --wait-for-data could wait for. Leave one out.")
    if dry_run is DryRun.client:
        from topwork.spec.yaml_output import as_yaml

        wanted = _rendered(files, Placement(image, namespace), overrides or (), wait_for_data)
        sys.stdout.write(as_yaml([manifest for each in wanted for manifest in each.rendered.objects]))
        return
    from topwork.cli.output.follow import Where

    try:
        cluster = open_cluster(namespace, context, kubeconfig)
    except SettingError:
        # What is wrong with the files comes first, as without defaults.
        _rendered(files, Placement(image, namespace), overrides or (), wait_for_data)
        raise
    defaults = _defaults(cluster)
    placement = Placement(image or (defaults.image if defaults else None), namespace)
    wanted = _rendered(files, placement, overrides or (), wait_for_data, defaults)
    if defaults:
        _tell_taken(defaults, with_image=image is None)
    if dry_run is DryRun.server:
        for each in wanted:
            _try(cluster, each)
        return
    where = Where(cluster.namespace, context, kubeconfig)
    code = _submit_all(cluster, wanted, where, follow, wait_for_data)
    if code:
        raise typer.Exit(code)


def _rendered(
    files: list[Path],
    placement: Placement,
    overrides: Sequence[str],
    wait_for_data: bool,
    defaults: "Defaults | None" = None,
) -> list[RenderedJob]:
    """Read and render everything before anything is applied."""
    found = read_and_render(files, placement, overrides, defaults.spec if defaults else None)
    for each in found:
        if wait_for_data and each.rendered.prefetch is None:
            raise SettingError(f"--wait-for-data needs spec.compute.prefetch: true, which {each.path} does not have.")
    return found


def _defaults(cluster: "Cluster") -> "Defaults | None":
    """Read what jobs of the namespace don't have to say; who must not read it goes without."""
    from topwork.clients.kubernetes.errors import ForbiddenError
    from topwork.cluster.manifests.defaults import SOURCE, read_defaults

    try:
        return read_defaults(cluster)
    except ForbiddenError as error:
        print(f"Note: {SOURCE} is not taken into account: {error}", file=sys.stderr)
        return None


def _tell_taken(defaults: "Defaults", *, with_image: bool) -> None:
    """Say what comes from the namespace and not from the files."""
    from topwork.cluster.manifests.defaults import SOURCE
    from topwork.spec.loading.problems import dotted
    from topwork.spec.messages import shown

    found = [f"image {defaults.image}"] if defaults.image and with_image else []
    taken = [(path, value) for path, value in defaults.spec.values.items() if path in defaults.spec.taken]
    found += [f"{dotted(path)} {shown(value)}" for path, value in taken]
    if found:
        print(f"from {SOURCE}: {', '.join(found)}")


def _submit_all(
    cluster: "Cluster", wanted: list[RenderedJob], where: "Where", follow: bool, wait_for_data: bool
) -> int:
    """Submit all, wait for their data and follow them, one after the other."""
    from topwork.cli.output import follow as following

    codes = []
    outcomes = [_submit(cluster, each, where, ahead=wait_for_data) for each in wanted]
    for each, outcome in zip(wanted, outcomes, strict=True):
        code = 0
        if wait_for_data and outcome in {"submitted", "replaced"}:
            code = _wait_for_data(cluster, each, where)
            if code == 0:
                _submit(cluster, each, where)
        if follow and code == 0:
            _next(each, where, follow=True)
            code = following.follow(cluster, each.job.run, where)
        codes.append(code)
        if code == following.INTERRUPTED:
            break
    if not follow and not wait_for_data:
        for each, outcome in zip(wanted, outcomes, strict=True):
            if outcome != "complete":
                _next(each, where, follow=False)
    return next((code for code in codes if code), 0)


def _submit(cluster: "Cluster", each: RenderedJob, where: "Where", *, ahead: bool = False) -> "Outcome":
    from topwork.cluster.operations.submit import Submission

    warned = len(cluster.warnings)
    outcome = Submission(cluster, each.rendered, print).submit(ahead=ahead)
    for warning in cluster.warnings[warned:]:
        print(f"Warning: {warning}", file=sys.stderr)
    run, name = each.job.run, each.job.metadata.name
    if outcome == "running":
        print(f"transferjob {name} unchanged: job.batch/{run} in namespace {where.namespace} is there already")
    elif outcome == "complete":
        print(f"transferjob {name} unchanged: job.batch/{run} in namespace {where.namespace} is complete")
        for line in _model(cluster, run):
            print(line)
    elif ahead:
        print(f"transferjob {name} pulls ahead as job.batch/{run}-pull in namespace {where.namespace}")
    else:
        print(f"transferjob {name} submitted as job.batch/{run} in namespace {where.namespace}")
        if each.rendered.prefetch:
            print(f"  job.batch/{run}-pull pulls ahead")
    return outcome


def _model(cluster: "Cluster", run: str) -> list[str]:
    from topwork.cluster.operations.find_runs import read_run
    from topwork.cluster.status.run_state import run_state

    objects = read_run(cluster, run)
    model = run_state(objects).model if objects.jobs else None
    return [f"  model  {model}"] if model else []


def _wait_for_data(cluster: "Cluster", each: RenderedJob, where: "Where") -> int:
    from topwork.cli.output import follow as following

    code = following.follow(cluster, each.job.run, where, "prefetch")
    if code:
        again = where.command(f"submit {each.path}", *as_options(each.overrides), "--wait-for-data")
        print(f"transferjob {each.job.metadata.name} is not submitted yet. Go on with: {again}")
    return code


def _next(each: RenderedJob, where: "Where", *, follow: bool) -> None:
    run = each.job.run
    if follow:
        print(f"following {run}; Ctrl-C leaves it running", flush=True)
    else:
        print(f"  follow  {where.command(f'status {run}', '--follow')}")
        print(f"  logs    {where.command(f'logs {run}', '-f')}")


def _try(cluster: "Cluster", each: RenderedJob) -> None:
    """Let the API server check what would be applied."""
    from topwork.cluster.operations.submit import Submission, called

    there, outcome = Submission(cluster, each.rendered, print).preview()
    if there is not None and outcome:
        print(f"{called(there)} unchanged, {outcome} (server dry run)")
        return
    if there is not None:
        print(f"{called(there)} would be replaced: it has failed or is being deleted (server dry run)")
        return
    for manifest in each.rendered.objects:
        cluster.apply(manifest, dry_run=True)
        kind = "job.batch" if manifest["kind"] == "Job" else "configmap"
        print(f"{kind}/{manifest['metadata']['name']} serverside-applied (server dry run)")
