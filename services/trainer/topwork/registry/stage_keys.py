"""Keys of stage results: a digest of everything that a result depends on, and of nothing else.

- dataset: the source, its content, and the settings that change what is stored; see `topwork.registry.datasets`
- transfer: dataset, splits and the content of their lists, image size, model, augmentation, `transfer`, seed, precision
- fine-tune: transfer's key, `fineTune`
- publish: key of the last training stage, metrics, formats, name of the model
- continuation: everything that the key of a training stage covers, except its number of epochs

Runs with the same key share the result. Gates are in no key: they are checked each time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from topwork.clients.s3.storage import Storage, describe_file
from topwork.data.dataset_manifest import StoredDataset
from topwork.data.splits.inputs import SplitInputs
from topwork.registry.imagenet_weights import find_converted_weights
from topwork.registry.split_inputs import read_split_inputs
from topwork.registry.stage_results import TrainingStage
from topwork.spec import TransferJob
from topwork.spec.digest import DIGEST_LENGTH, digest_of, evaluation_content, training_content
from topwork.spec.model import Base

FORMATS = {"transfer": 1, "fine-tune": 1, "publish": 1}
"""Version of the results of each stage. Increase one when topwork would compute a different result from the same spec,
or when the meaning of a default changes; the stage then runs again for every job."""


@dataclass(frozen=True)
class StageKeys:
    """The keys of a job on one dataset.

    Attributes:
        transfer: Key of the transfer stage.
        fine_tune: Key of the fine-tune stage; None without `spec.fineTune`.
        publish: Key of evaluation and publishing.
        continuations: Continuation key of each training stage: stages that differ only in their number of epochs have
            the same one.
    """

    transfer: str
    fine_tune: str | None
    publish: str
    continuations: dict[TrainingStage, str]

    @property
    def training(self) -> str:
        """Key of the last training stage, which the name of the run is made from."""
        return self.fine_tune or self.transfer

    @property
    def training_stages(self) -> dict[TrainingStage, str]:
        """The key of each training stage, in order."""
        keys: dict[TrainingStage, str] = {"transfer": self.transfer}
        return keys | ({"fine-tune": self.fine_tune} if self.fine_tune else {})


def stage_keys(job: TransferJob, fingerprint: str, storage: Storage, inputs: SplitInputs | None = None) -> StageKeys:
    """Compute the keys of a job.

    Args:
        job: The job.
        fingerprint: Fingerprint of the dataset.
        storage: Storage of the job, which also reads the version of a base on S3.
        inputs: Inputs of the splits, if the stored dataset has them already; None reads them.

    Returns:
        The keys: 16 hex digits each.

    Raises:
        DataError: If a list of the splits does not exist.
        UnavailableError: If the base or a list is on S3 and storage cannot be reached.

    Example:
        >>> stage_keys(job, dataset.metadata.fingerprint, storage).transfer
        '0f3a9c57d2e84b16'
    """
    content = training_content(job.spec)
    del content["storage"]
    fine_tuning = content.pop("fineTune", None)
    # The fingerprint covers the settings that change the stored dataset.
    for key in ("source", "classes", "onContradiction"):
        content["dataset"].pop(key, None)
    base = read_base_version(job.spec.model.base, storage)
    if split_inputs := (inputs or read_split_inputs(job, storage)).content():
        content["splitInputs"] = split_inputs
    content |= {"images": fingerprint, "base": base}
    transfer, continuations = _key("transfer", content), dict[TrainingStage, str]()
    continuations["transfer"] = _continuation_key("transfer", content)
    fine_tune = None
    if fine_tuning is not None:
        tuned = {"transfer": transfer, "fineTune": fine_tuning}
        fine_tune, continuations["fine-tune"] = _key("fine-tune", tuned), _continuation_key("fine-tune", tuned)
    publish = {"training": fine_tune or transfer, "name": job.model_name, **evaluation_content(job.spec)}
    return StageKeys(transfer, fine_tune, _key("publish", publish), continuations)


def architecture_key(job: TransferJob, dataset: StoredDataset, storage: Storage) -> str:
    """Return a key that models with the same operations share, such as those of all folds of a job."""
    return stage_keys(job.with_fold(None), dataset.metadata.fingerprint, storage, dataset.inputs).transfer


def run_name(job: TransferJob, keys: StageKeys) -> str:
    """Return the name of the run of a job on a dataset: `<name>-<8 hex digits>`, by its training key and storage."""
    return f"{job.metadata.name}-{digest_of([job.spec.storage, keys.training])[:8]}"


def name_run(job: TransferJob, fingerprint: str, storage: Storage) -> TransferJob:
    """Return a job with the name of its run on a dataset; arguments and errors are those of `stage_keys`."""
    return job.as_run(run_name(job, stage_keys(job, fingerprint, storage)))


def cluster_run_name(job: TransferJob, fingerprint: str, storage: Storage) -> str:
    """Return the name of the run of a job in a cluster, by everything that can change what its Job does.

    A Kubernetes Job cannot be changed, so a job with another gate or format needs a Job with another name.
    """
    files = read_file_versions(job, storage)
    return f"{job.metadata.name}-{digest_of([job.digest, fingerprint, *(files or [''])])[:8]}"


def read_file_versions(job: TransferJob, storage: Storage) -> list[Any]:
    """Identify the content of the files that a job uses besides its dataset: its base, and the lists of its splits.

    Args:
        job: The job.
        storage: Storage of the job.

    Returns:
        The version of the base, and digests of the inputs of the splits if there are any; empty without such files.

    Raises:
        DataError: If a list of the splits does not exist.
    """
    base, inputs = read_base_version(job.spec.model.base, storage), read_split_inputs(job, storage).content()
    return [base, inputs] if inputs else [base] if base else []


def read_base_version(base: Base, storage: Storage) -> str:
    """Identify the content of the file that a base is built from, without downloading it.

    Args:
        base: `spec.model.base`.
        storage: Storage of the job.

    Returns:
        The ETag and size of an object, the SHA-256 of a local file; empty if the base needs no file of the user or the
        file does not exist.
    """
    if base.needs_imagenet:
        # Those of Keras never change.
        converted = find_converted_weights(str(base.application), storage)
        return f"{converted.etag} {converted.size}" if converted else ""
    if base.saved is None and not base.has_weights_file:
        return ""
    uri = base.saved.uri if base.saved else base.weights
    if not str(uri).startswith("s3://"):
        path = Path(str(uri))
        return describe_file(path).sha256 if path.is_file() else ""
    directory, _, name = str(uri).rpartition("/")
    found = (stored for stored in storage.at(directory).list(name) if stored.key == name)
    return next((f"{stored.etag} {stored.size}" for stored in found), "")


def _key(stage: str, content: dict[str, Any]) -> str:
    return digest_of({"format": FORMATS[stage], stage: content})[:DIGEST_LENGTH]


def _continuation_key(stage: TrainingStage, content: dict[str, Any]) -> str:
    section = "transfer" if stage == "transfer" else "fineTune"
    settings = {name: value for name, value in content.get(section, {}).items() if name != "epochs"}
    return _key(stage, {**content, section: settings, "continued": True})
