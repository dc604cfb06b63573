"""The stored findings of the audit of a dataset, and their part of the report."""

from dataclasses import dataclass

from topwork.artifacts import read_json_record, read_manifest
from topwork.audit.findings import AuditFindings, DuplicatePair, LabelIssue
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import StoredDataset
from topwork.errors import FormatError
from topwork.registry.versions import version_prefix
from topwork.spec import TransferJob
from topwork.spec.digest import DIGEST_LENGTH, digest_of, training_content

FORMAT = 1
"""Version of the findings. Increase it when the same dataset would give other findings."""

FINDINGS_FILE, SUSPECTS_FILE = "audit.json", "suspects.csv"
MAX_PICTURES = 24
"""Pairs of duplicates, and images with a suspect class, that the report shows."""


@dataclass(frozen=True)
class IllustratedFindings:
    """Findings with pictures for the report.

    Attributes:
        findings: The findings.
        pairs: Pairs of duplicates with both images as data URIs.
        labels: Images whose class is probably wrong, as data URIs.
    """

    findings: AuditFindings
    pairs: tuple[tuple[DuplicatePair, str, str], ...] = ()
    labels: tuple[tuple[LabelIssue, str], ...] = ()


def findings_key(job: TransferJob, dataset: StoredDataset) -> str:
    """Return a digest of everything that the findings depend on."""
    settings = job.spec.dataset.audit
    splits = training_content(job.spec)["dataset"]
    model = job.spec.model.model_dump(mode="json") if settings.label_issues == "report" else None
    inputs = dataset.inputs.content() if dataset.inputs else {}
    searches = [settings.near_duplicates, settings.label_issues, model]
    return digest_of([FORMAT, dataset.metadata.fingerprint, splits, job.spec.seed, searches, inputs])


def read_findings(job: TransferJob, dataset: StoredDataset, storage: Storage) -> AuditFindings | None:
    """Read the findings of a run.

    Args:
        job: The job.
        dataset: The stored dataset.
        storage: Storage of the job.

    Returns:
        The findings; None if the run has none for this dataset and these settings.

    Raises:
        DataError: If the file was not written by topwork.
    """
    findings = _read(storage, f"runs/{job.run}/{FINDINGS_FILE}")
    return findings if findings and findings.key == findings_key(job, dataset) else None


def read_shared_findings(job: TransferJob, dataset: StoredDataset, storage: Storage) -> AuditFindings | None:
    """Read the complete findings that another run has stored with the dataset; None if there are none.

    Arguments and errors are those of `read_findings`.
    """
    findings = _read(storage, _shared_key(job, dataset))
    return findings if findings and findings.key == findings_key(job, dataset) else None


def write_shared_findings(job: TransferJob, dataset: StoredDataset, storage: Storage, findings: AuditFindings) -> None:
    """Store complete findings with the dataset, for other runs with the same splits. They are deleted with it."""
    data = findings.model_dump_json(by_alias=True).encode()
    storage.write(_shared_key(job, dataset), data, content_type="application/json")


def _shared_key(job: TransferJob, dataset: StoredDataset) -> str:
    return f"{dataset.prefix}/audit/{findings_key(job, dataset)[:DIGEST_LENGTH]}.json"


def read_version_findings(storage: Storage, name: str, version: int) -> AuditFindings | None:
    """Read the findings that were published with a version; None if there are none."""
    prefix = version_prefix(name, version)
    manifest = read_manifest(storage, prefix)
    if manifest is None or FINDINGS_FILE not in manifest.files:
        return None
    return _read(storage, manifest.key_of(prefix, FINDINGS_FILE))


def _read(storage: Storage, key: str) -> AuditFindings | None:
    data = storage.read(key)
    if data is None:
        return None
    try:
        return read_json_record(AuditFindings, data, storage.uri_of(key), "the findings of an audit")
    except FormatError:
        return None
