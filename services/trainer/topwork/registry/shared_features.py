"""Features that several runs share: the cached output of frozen layers, kept for the trials of a search.

- `features/<key>/<split>/…`: the features; the key covers everything that they depend on
- `features/<key>/used-by/<owner>`: who uses them, a search or a run, and since when

Runs that publish a model delete their features themselves, at the end of their stage.
"""

from topwork.clients.s3.cleanup import tolerate_cleanup_failure
from topwork.clients.s3.storage import Storage
from topwork.search.jobs import SEARCH_LABEL
from topwork.spec import TransferJob

ROOT = "features"
"""Key prefix of all shared features."""


def owner_of(job: TransferJob) -> str:
    """Return who uses the features of a job: its search, or its run without one."""
    return job.metadata.labels.get(SEARCH_LABEL) or job.run


def mark_used(storage: Storage, prefix: str, owner: str) -> None:
    """Record that features are used now. Garbage collection deletes those that were not used for some time.

    Args:
        storage: Storage of the job.
        prefix: Key prefix of the features.
        owner: Result of `owner_of`.
    """
    storage.write(f"{prefix}/used-by/{owner}", b"")


def delete_features_of_search(job: TransferJob, storage: Storage) -> None:
    """Delete the features of a search whose best model a job has published; nothing if the job is not of a search.

    Arguments are those of `delete_shared_features`, with the job instead of its search.
    """
    if search := job.metadata.labels.get(SEARCH_LABEL):
        delete_shared_features(storage, search)


def delete_shared_features(storage: Storage, owner: str) -> None:
    """Delete the features that only one search or run uses. If they are needed again, they are computed again.

    A failure is logged: garbage collection deletes them later.

    Args:
        storage: Storage of the search.
        owner: Id of the search, as in the label of its runs, or name of a run without a search.

    Example:
        `delete_shared_features(storage, "cats-5d41402a")`
    """
    with tolerate_cleanup_failure(f"features of {owner}"):
        by_prefix: dict[str, list[str]] = {}
        for stored in storage.list(f"{ROOT}/"):
            by_prefix.setdefault("/".join(stored.key.split("/")[:2]), []).append(stored.key)
        for prefix, keys in by_prefix.items():
            users = {key for key in keys if key.startswith(f"{prefix}/used-by/")}
            own = f"{prefix}/used-by/{owner}"
            if own in users:
                storage.delete(keys if users == {own} else [own])
