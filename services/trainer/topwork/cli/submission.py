"""Submitting jobs as plain Jobs or as TransferJobs, following them, and printing what happens."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from topwork.cli.job_files import RenderedJob
from topwork.cli.options import format_overrides
from topwork.cli.output import follow as following
from topwork.cli.output.follow import ConnectionOptions
from topwork.cli.source_check import CheckedSource
from topwork.clients.kubernetes.cluster import Cluster
from topwork.clients.kubernetes.errors import ForbiddenError
from topwork.cluster.operations.run_lookup import find_run, read_run
from topwork.cluster.operations.runs import read_run_objects
from topwork.cluster.operations.submit import Outcome, Submission
from topwork.cluster.operations.submit_transfer_job import TransferJobSubmission, build_object
from topwork.cluster.operations.transfer_jobs import get_transfer_job
from topwork.cluster.status.objects import kubectl_name
from topwork.cluster.status.run_status import read_run_status
from topwork.cluster.status.transfer_job_run import is_final, read_transfer_job_status
from topwork.errors import SettingError
from topwork.spec.loading.defaults import SpecDefaults

DRY_RUN_OUTCOMES = {
    "submitted": "serverside-applied",
    "changed": "serverside-applied",
    "replaced": "would be replaced",
    "unchanged": "unchanged",
    "complete": "unchanged, complete",
}


class CheckedJob(NamedTuple):
    """A job to submit, its source as it is now, and the defaults of its namespace."""

    rendered: RenderedJob
    source: CheckedSource
    defaults: SpecDefaults | None = None

    @property
    def spec_run(self) -> str:
        """Name of the run by its spec alone."""
        return self.rendered.job.as_run("").run


def describe_changed_source(job: CheckedJob) -> str:
    """Say that a job trains on a source that has changed."""
    name, changes = job.rendered.job.metadata.name, job.source.changes
    return f"transferjob {name}: source changed: {changes}; --pinned keeps the previous dataset"


@dataclass(frozen=True)
class Submitter(ABC):
    """Submits jobs with the same options.

    Attributes:
        cluster: The cluster.
        connection: The options that selected it.
        restart: Whether to start complete runs again, without their results.
        options: The options that change what is submitted, to repeat them in commands that are shown to the user.
    """

    cluster: Cluster
    connection: ConnectionOptions
    restart: bool
    options: tuple[str, ...]

    def submit_all(self, jobs: list[CheckedJob], *, follow: bool) -> int:
        """Submit all jobs, then follow them, one after the other; return the exit code of the first that failed."""
        codes = []
        outcomes = [self._submit_with_warnings(job) for job in jobs]
        for job, outcome in zip(jobs, outcomes, strict=True):
            code = self._wait_for_data(job, outcome)
            if follow and code == 0:
                print(f"following {self._target(job)}; press Ctrl-C to leave it running", flush=True)
                code = self._follow(job)
            codes.append(code)
            if code == following.INTERRUPTED:
                break
        if not follow:
            for job, outcome in zip(jobs, outcomes, strict=True):
                if outcome != "complete":
                    self._print_next_commands(job)
        return next((code for code in codes if code), 0)

    def validate_all(self, jobs: list[CheckedJob]) -> None:
        """Let the API server validate what would be applied."""
        for job in jobs:
            for line in self._validate(job):
                print(f"{line} (server dry run)")

    @abstractmethod
    def _submit(self, job: CheckedJob) -> str:
        """Submit a job, print the outcome and return it."""

    @abstractmethod
    def _target(self, job: CheckedJob) -> str:
        """Return the name by which commands find the job."""

    @abstractmethod
    def _follow(self, job: CheckedJob) -> int:
        """Follow a job to its end, and return its exit code."""

    @abstractmethod
    def _validate(self, job: CheckedJob) -> Iterator[str]:
        """Yield what would be applied, after the API server has validated it."""

    def _wait_for_data(self, job: CheckedJob, outcome: str) -> int:
        """Wait until the dataset is pulled, if requested; return the exit code."""
        return 0

    def _print_next_commands(self, job: CheckedJob) -> None:
        connection, target = self._connection_of(job), self._target(job)
        print(f"  follow  {connection.command(f'status {target}', '--follow')}")
        print(f"  logs    {connection.command(f'logs {target}', '-f')}")

    def _submit_with_warnings(self, job: CheckedJob) -> str:
        known = len(self.cluster.warnings)
        outcome = self._submit(job)
        for warning in self.cluster.warnings[known:]:
            print(f"Warning: {warning}", file=sys.stderr)
        return outcome

    def _cluster_of(self, job: CheckedJob) -> Cluster:
        namespace = job.rendered.options.namespace
        return (
            self.cluster if namespace in {None, self.cluster.namespace} else self.cluster.in_namespace(str(namespace))
        )

    def _connection_of(self, job: CheckedJob) -> ConnectionOptions:
        return replace(self.connection, namespace=self._cluster_of(job).namespace)

    def _print_unchecked_source(self, job: CheckedJob, run: str, *, is_complete: bool, hint: str) -> None:
        """Say that this command did not check the source, and whether a pod does."""
        unchecked = job.source.unchecked
        if unchecked and not is_complete:
            print(f"Note: the pod checks the source, not this command: {unchecked}", file=sys.stderr)
        elif unchecked:
            print(
                f"Note: the source was not checked, and images may have changed since {run} was complete: {unchecked}. "
                f"To let a pod check it, submit again after: {hint}",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class JobSubmitter(Submitter):
    """Submits plain Jobs.

    Attributes:
        wait_for_data: Whether to pull the dataset before requesting GPUs.
    """

    wait_for_data: bool = False

    def _submit(self, job: CheckedJob) -> Outcome:
        self._reject_transfer_job(job)
        return self._apply(job, prefetch_only=self.wait_for_data, restart=self.restart)

    def _target(self, job: CheckedJob) -> str:
        return job.rendered.job.run

    def _follow(self, job: CheckedJob) -> int:
        return following.follow(self._cluster_of(job), job.rendered.job.run, self._connection_of(job))

    def _print_next_commands(self, job: CheckedJob) -> None:
        if not self.wait_for_data:
            super()._print_next_commands(job)

    def _wait_for_data(self, job: CheckedJob, outcome: str) -> int:
        """Follow the prefetch Job to its end, then submit the Job that trains."""
        if not self.wait_for_data or outcome not in {"submitted", "replaced"}:
            return 0
        connection, rendered = self._connection_of(job), job.rendered
        code = following.follow(self._cluster_of(job), rendered.job.run, connection, "prefetch")
        if code:
            options = (*format_overrides(rendered.overrides), *self.options, "--wait-for-data")
            command = connection.command(f"submit {rendered.path}", *options)
            print(f"transferjob {rendered.job.metadata.name} is not submitted yet. Continue with: {command}")
        else:
            self._apply(job)
        return code

    def _validate(self, job: CheckedJob) -> Iterator[str]:
        cluster = self._cluster_of(job)
        self._reject_transfer_job(job)
        existing, outcome = Submission(cluster, job.rendered.rendered, print).preview(restart=self.restart)
        if existing is not None and outcome:
            yield f"{kubectl_name(existing)} unchanged, {outcome}"
        elif existing is not None:
            cause = "is finished" if self.restart else "has failed"
            yield f"{kubectl_name(existing)} would be replaced: it {cause} or is being deleted"
        else:
            for obj in job.rendered.rendered.objects:
                cluster.apply(obj, dry_run=True)
                yield f"{kubectl_name(obj)} serverside-applied"

    def _reject_transfer_job(self, job: CheckedJob) -> None:
        """Refuse to submit a run that an unfinished TransferJob trains."""
        cluster, name = self._cluster_of(job), job.rendered.job.metadata.name
        try:
            existing = get_transfer_job(cluster, name)
        except ForbiddenError:
            return  # the Job of another owner is reported below
        if existing is None or is_final(existing):
            return
        run = read_transfer_job_status(existing).run
        if run in {None, job.rendered.job.run, job.spec_run}:
            raise SettingError(
                f"transferjob/{name} in namespace {cluster.namespace} is the same run and is not finished. Submit it "
                f"without --as job, or stop it with: {self._connection_of(job).command(f'cancel {name}')}"
            )

    def _apply(self, job: CheckedJob, *, prefetch_only: bool = False, restart: bool = False) -> Outcome:
        cluster, rendered = self._cluster_of(job), job.rendered.rendered
        outcome = Submission(cluster, rendered, print).submit(prefetch_only=prefetch_only, restart=restart)
        run, name, namespace = job.rendered.job.run, job.rendered.job.metadata.name, cluster.namespace
        hint = self._connection_of(job).command(f"cancel {run}")
        self._print_unchecked_source(job, run, is_complete=outcome == "complete", hint=hint)
        if outcome == "running":
            print(f"transferjob {name} unchanged: job.batch/{run} in namespace {namespace} already exists")
        elif outcome == "complete":
            print(f"transferjob {name} unchanged: job.batch/{run} in namespace {namespace} is complete")
            if model := _read_model_uri(cluster, run):
                print(f"  model  {model}")
        elif prefetch_only:
            print(f"transferjob {name} pulls its dataset as job.batch/{run}-pull in namespace {namespace}")
        else:
            print(f"transferjob {name} submitted as job.batch/{run} in namespace {namespace}")
            if rendered.prefetch:
                print(f"  job.batch/{run}-pull pulls its dataset")
        return outcome


@dataclass(frozen=True)
class TransferJobSubmitter(Submitter):
    """Submits TransferJobs, which the controller runs.

    Attributes:
        pinned: Whether to use the dataset that was used before.
    """

    pinned: bool = False

    def _submission(self, job: CheckedJob) -> TransferJobSubmission:
        dataset = job.source.dataset if self.pinned else ""
        options = replace(job.rendered.options, dataset=dataset, restart=False, default_image=None)
        return TransferJobSubmission(
            self._cluster_of(job),
            build_object(job.rendered.job, options, job.rendered.filled),
            job.spec_run,
            lambda line: print(line, flush=True),
            checked_run="" if job.source.unchecked else job.source.run,
            source_changed=bool(job.source.changes),
            defaults=job.defaults,
        )

    def _submit(self, job: CheckedJob) -> str:
        outcome = self._submission(job).submit(restart=self.restart)
        cluster, name = self._cluster_of(job), job.rendered.job.metadata.name
        connection = self._connection_of(job)
        is_complete = outcome == "complete"
        again = f"kubectl delete transferjob {name} -n {cluster.namespace}"
        self._print_unchecked_source(job, job.spec_run, is_complete=is_complete, hint=again)
        where = f"in namespace {cluster.namespace}"
        if outcome in {"submitted", "replaced"} and job.source.changes:
            print(describe_changed_source(job))
        if outcome in {"submitted", "replaced"}:
            print(f"transferjob/{name} submitted {where} as run {job.spec_run}")
        elif outcome == "changed":
            print(f"transferjob/{name} changed {where}; its run is {job.spec_run}")
        else:
            status = read_run(cluster, find_run(cluster, name))
            reason = f": {status.reason}" if status.reason else ""
            state = "complete" if is_complete else f"{status.phase}{reason}"
            print(f"transferjob/{name} unchanged {where}: {status.name} is {state}")
            if status.model:
                print(f"  model  {status.model}")
        if outcome == "unchanged" and job.source.changes:
            print(
                f"Note: the source changed: {job.source.changes}. Submit again when the run is finished, or after: "
                f"{connection.command(f'cancel {name}')}",
                file=sys.stderr,
            )
        return outcome

    def _target(self, job: CheckedJob) -> str:
        return job.rendered.job.metadata.name

    def _follow(self, job: CheckedJob) -> int:
        return following.follow_transfer_job(self._cluster_of(job), self._target(job), self._connection_of(job))

    def _validate(self, job: CheckedJob) -> Iterator[str]:
        outcome = self._submission(job).preview(restart=self.restart)
        yield f"transferjob.topwork.dev/{self._target(job)} {DRY_RUN_OUTCOMES[outcome]}"


def _read_model_uri(cluster: Cluster, run: str) -> str | None:
    objects = read_run_objects(cluster, run)
    return read_run_status(objects).model if objects.jobs else None
