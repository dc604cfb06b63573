"""Submitting TransferSearches, following them, and printing what happens."""

import sys
from dataclasses import dataclass, replace

from topwork.cli.job_files import SearchSpecFile
from topwork.cli.output import transfer_search
from topwork.cli.output.follow import ConnectionOptions
from topwork.clients.kubernetes import KubernetesObject
from topwork.clients.kubernetes.cluster import Cluster
from topwork.cluster.manifests.render import RenderOptions, render
from topwork.cluster.manifests.transfer_search import build_transfer_search
from topwork.cluster.operations.submit_transfer_job import remove_value
from topwork.cluster.operations.transfer_searches import SearchSubmission, SubmittedSearch
from topwork.cluster.status.objects import name_of
from topwork.spec import TransferJob

DRY_RUN_OUTCOMES = {
    "submitted": "serverside-applied",
    "changed": "serverside-applied",
    "resumed": "would be resumed",
    "replaced": "would be replaced",
    "unchanged": "unchanged",
    "complete": "unchanged, complete",
}
OUTCOMES = {
    "submitted": "submitted",
    "replaced": "submitted",
    "changed": "changed",
    "resumed": "resumed",
    "unchanged": "unchanged",
    "complete": "unchanged, and complete,",
}


def build_search(file: SearchSpecFile, image: str | None) -> KubernetesObject:
    """Build the TransferSearch to apply, with only the values that its file and the options set.

    Args:
        file: The search.
        image: Image of all containers, which replaces that of the template.

    Raises:
        SpecError: If the template refers to files on this machine, which pods can't read.
    """
    search = file.search
    template = search.spec.template.model_copy(update={"suspend": False})
    job = TransferJob(api_version=search.api_version, kind="TransferJob", metadata=search.metadata, spec=template)
    render(job, RenderOptions(image, file.namespace))
    obj = build_transfer_search(search, file.namespace)
    for path in file.filled:
        remove_value(obj, path)
    if image:
        template_obj = obj["spec"]["template"]
        template_obj["compute"] = (template_obj.get("compute") or {}) | {"image": image}
    return obj


@dataclass(frozen=True)
class SearchSubmitter:
    """Submits searches with the same options.

    Attributes:
        cluster: The cluster.
        connection: The options that selected it.
        image: Image of all containers; None for that of the template.
    """

    cluster: Cluster
    connection: ConnectionOptions
    image: str | None

    def submit_all(self, files: list[SearchSpecFile], *, follow: bool) -> int:
        """Submit all searches, then follow them, one after the other; return the exit code of the first that failed."""
        submissions = [self._submission(file) for file in files]
        submitted = [self._submit(submission) for submission in submissions]
        pairs = zip(submissions, submitted, strict=True) if follow else ()
        codes = [self._follow(submission, result) for submission, result in pairs]
        return next((code for code in codes if code), 0)

    def validate_all(self, files: list[SearchSpecFile]) -> None:
        """Let the API server validate what would be applied."""
        for submission in map(self._submission, files):
            outcome = DRY_RUN_OUTCOMES[submission.preview()]
            print(f"transfersearch.topwork.dev/{name_of(submission.obj)} {outcome} (server dry run)")

    def _submission(self, file: SearchSpecFile) -> SearchSubmission:
        cluster = self.cluster.in_namespace(file.namespace) if file.namespace else self.cluster
        return SearchSubmission(cluster, build_search(file, self.image), lambda line: print(line, flush=True))

    def _submit(self, submission: SearchSubmission) -> SubmittedSearch:
        known = len(self.cluster.warnings)
        submitted = submission.submit()
        name, namespace = name_of(submission.obj), submission.cluster.namespace
        print(f"transfersearch/{name} {OUTCOMES[submitted.outcome]} in namespace {namespace}")
        for warning in self.cluster.warnings[known:]:
            print(f"Warning: {warning}", file=sys.stderr)
        if submitted.outcome != "complete":
            connection = replace(self.connection, namespace=namespace)
            print(f"  follow  {connection.command(f'status transfersearch/{name}', '--follow')}")
        return submitted

    def _follow(self, submission: SearchSubmission, submitted: SubmittedSearch) -> int:
        name = name_of(submission.obj)
        print(f"following transfersearch/{name}; press Ctrl-C to leave it running", flush=True)
        connection = replace(self.connection, namespace=submission.cluster.namespace)
        return transfer_search.follow(submission.cluster, name, connection, submitted.ended)
