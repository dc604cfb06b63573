"""What a spec names that a pod can't reach: paths on the machine of whoever wrote it."""

from collections.abc import Iterator

from topwork.spec import TransferJob
from topwork.spec.address import SCHEME


def local_paths(job: TransferJob) -> Iterator[tuple[str, str]]:
    """Find the addresses that only the user's machine knows.

    Args:
        job: The job.

    Yields:
        The path of each key and its value.
    """
    source, base = job.spec.dataset.source, job.spec.model.base
    for kind in ("folder", "archive", "table"):
        if (given := getattr(source, kind)) and not SCHEME.match(given.uri):
            yield f"spec.dataset.source.{kind}.uri", given.uri
    if base.weights not in (None, "imagenet", "none") and not SCHEME.match(base.weights):
        yield "spec.model.base.weights", base.weights
    if base.saved and not SCHEME.match(base.saved.uri):
        yield "spec.model.base.saved.uri", base.saved.uri
