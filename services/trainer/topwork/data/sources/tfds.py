"""Images of a TensorFlow Datasets (TFDS) dataset, downloaded by TFDS or copied from the mirror in storage."""

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import structlog
import tensorflow as tf
import tensorflow_datasets as tfds
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from topwork.artifacts import download_artifact, read_manifest
from topwork.clients.prometheus.metrics import Metrics
from topwork.data.sources.source import ClassNames, SourceImage, SpaceEstimate, slugify
from topwork.data.tfds_mirror import (
    MIRROR_PREFIX,
    TfdsName,
    download_data,
    download_metadata,
    is_prepared_key,
    list_mirrored,
)
from topwork.errors import DataError, UnavailableError, quote_error
from topwork.workspace import Workspace

ATTEMPTS = 3
BACKOFF_SECONDS = 5.0
GROWTH_CHECK_SECONDS = 10.0

# About 12 seconds per file. With the default of 10, a pod without internet access would occupy its GPUs for 3 minutes
# longer.
downloader.MAX_RETRIES = 6

log = structlog.get_logger(__name__)


class TfdsSource:
    """A dataset of the TFDS catalog, of a module that registers one, or of the mirror in storage."""

    is_listed = False
    is_versioned = True

    def __init__(self, name: str, workspace: Workspace) -> None:
        self._workspace = workspace
        self._name = TfdsName.parse(name)
        self._directory = workspace.scratch / "pull" / "tfds"
        builder = load_builder(name, self._directory / "data")
        full_name = None if isinstance(builder, Exception) else str(builder.info.full_name)
        self._mirrored = self._name.select(list_mirrored(workspace.storage, self._name.name), full_name)
        if self._mirrored:
            directory = download_metadata(workspace.storage, self._mirrored, self._directory / "mirrored")
            self._builder = tfds.builder_from_directory(directory)
        elif isinstance(builder, Exception):
            raise self._not_found(name, builder) from builder
        else:
            self._builder = builder
        self._image_key, self._label_key = find_image_and_label(self._builder)
        self.name = slugify(self._builder.info.full_name.rpartition("/")[0])

    def _not_found(self, name: str, error: Exception) -> DataError:
        if not isinstance(error, tfds.core.DatasetNotFoundError):
            return DataError(f"spec.dataset.source.tfds is {name}: {error}{self._mirrored_hint}")
        return DataError(
            f"spec.dataset.source.tfds is {name}, which TensorFlow Datasets {tfds.__version__} does not provide. "
            "See https://www.tensorflow.org/datasets/catalog, or copy your own dataset, prepared by TFDS, to storage: "
            f"{self._mirror_command} --data-dir DIR.{self._mirrored_hint}"
        )

    @property
    def is_mirrored(self) -> bool:
        """Whether the prepared dataset is in storage."""
        return self._mirrored is not None

    def description(self) -> dict[str, Any]:
        """Return the name of the dataset with its configuration and version."""
        return {"tfds": self._builder.info.full_name}

    def digest(self) -> str:
        """Return the full name: TFDS never changes the content of a version."""
        return str(self._builder.info.full_name)

    def entries(self) -> None:
        """Return None: the examples of a TFDS dataset are known only after its download."""

    def estimate_space(self) -> SpaceEstimate:
        """Return the sizes of the download and of the prepared dataset, as TFDS records them."""
        info = self._builder.info
        download_bytes = 0 if self._mirrored else int(info.download_size or 0)
        dataset_bytes = int(info.dataset_size or 0)
        return SpaceEstimate(download_bytes=download_bytes + dataset_bytes, image_bytes=dataset_bytes)

    def class_names(self) -> tuple[str, ...]:
        """Return the classes in the order of the dataset's labels."""
        return tuple(dict.fromkeys(self._names_of_labels()))

    def _names_of_labels(self) -> list[str]:
        names = ClassNames(f"The dataset {self._builder.info.full_name}")
        return [names.add(name) for name in read_label_names(self._builder, self._label_key)]

    def class_sizes(self) -> None:
        """Return None: TFDS records the number of examples of a split, but not of its classes."""

    def splits(self) -> Mapping[str, int | None]:
        """Return the splits of the dataset. Downloads it."""
        return {name: int(split.num_examples) for name, split in self._prepared_builder.info.splits.items()}

    def images(self, split: str) -> Iterator[SourceImage]:
        """Yield the images in the order of the files."""
        options = tf.data.Options()
        options.autotune.enabled = False
        # Not decoded here: the encoded image is validated like any other.
        with tf.device("CPU:0"):
            dataset = self._prepared_builder.as_dataset(
                split=split,
                decoders={self._image_key: tfds.decode.SkipDecoding()},
                shuffle_files=False,
                read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, options=options),
            )
        classes = self._names_of_labels()
        for number, example in enumerate(dataset.as_numpy_iterator()):
            label = int(example[self._label_key])
            # TFDS uses -1 for an unknown label.
            class_name = classes[label] if label >= 0 else None
            yield SourceImage(f"{split}/{number}", class_name, partial(bytes, example[self._image_key]))

    @property
    def directory(self) -> Path:
        """Local directory of the prepared dataset. Downloads it."""
        return Path(self._prepared_builder.data_dir)

    @cached_property
    def _prepared_builder(self) -> Any:
        """The builder, with its files on scratch."""
        if self._mirrored:
            log.info("copying TFDS dataset from mirror", dataset=self._mirrored)
            download_data(self._workspace.storage, self._mirrored, self._directory / "mirrored")
        else:
            self._download_and_prepare()
        return self._builder

    def _download_and_prepare(self) -> None:
        downloads = self._directory / "downloads"
        has_downloads = self._copy_mirrored_downloads()
        if self._builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not has_downloads:
            instructions = self._builder.MANUAL_DOWNLOAD_INSTRUCTIONS.strip()
            raise DataError(
                f"{self._builder.name} must be downloaded manually. {instructions} Store the files below "
                f"{self._mirror_uri}/manual/."
            )
        config = tfds.download.DownloadConfig(
            try_download_gcs=False, compute_stats="skip", manual_dir=downloads / "manual"
        )
        retrying = Retrying(
            retry=retry_if_exception(_is_retryable),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(BACKOFF_SECONDS),
            reraise=True,
        )
        log.info("preparing TFDS dataset", dataset=self._builder.info.full_name, downloads_mirrored=has_downloads)
        tfds.disable_progress_bar()
        try:
            # TFDS prints to standard output, which is reserved for the output of commands.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                record_directory_growth(self._directory, self._workspace.metrics),
            ):
                retrying(self._builder.download_and_prepare, download_dir=downloads, download_config=config)
        except ImportError as error:
            raise DataError(
                f"{self._builder.name} cannot be prepared: {quote_error(error)}. Add the module to the container "
                "image, or provide the images as a folder, archive or table."
            ) from error
        except Exception as error:
            if not _is_network_error(error):
                raise
            raise UnavailableError(
                f"{self._builder.name} could not be downloaded, after several attempts per file: {quote_error(error)} "
                f"Without internet access, run `{self._mirror_command}` on a machine that has it, or copy the TFDS "
                f"download directory of such a machine to {self._mirror_uri}/.{self._mirrored_hint}"
            ) from error

    @property
    def _mirror_command(self) -> str:
        return f"topwork mirror tfds {self._workspace.storage.uri} {self._name}"

    @property
    def _mirrored_hint(self) -> str:
        full_names = list_mirrored(self._workspace.storage, self._name.name)
        return f" The mirror contains {', '.join(full_names)}." if full_names else ""

    @property
    def _mirror_prefix(self) -> str:
        return f"{MIRROR_PREFIX}/{self._builder.name}"

    @property
    def _mirror_uri(self) -> str:
        return self._workspace.storage.uri_of(self._mirror_prefix)

    def _copy_mirrored_downloads(self) -> bool:
        """Copy the mirrored TFDS download directory to scratch; TFDS verifies its content.

        Returns:
            Whether the mirror has a download directory, either with a manifest or copied there manually.
        """
        storage, directory = self._workspace.storage, self._directory / "downloads"
        if read_manifest(storage, self._mirror_prefix):
            download_artifact(storage, self._mirror_prefix, directory)
            return True
        has_downloads = False
        for stored in storage.list(f"{self._mirror_prefix}/"):
            path = directory / stored.key.removeprefix(f"{self._mirror_prefix}/")
            is_inside = path.resolve().is_relative_to(directory.resolve())
            if is_inside and not stored.key.endswith("/") and not is_prepared_key(stored.key):
                has_downloads = True
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.download(stored.key, path)
        return has_downloads


@contextlib.contextmanager
def record_directory_growth(directory: Path, metrics: Metrics, seconds: float = GROWTH_CHECK_SECONDS) -> Iterator[None]:
    """Record progress whenever a directory changes its size: TFDS reports no progress during long downloads.

    Args:
        directory: Directory to which the block writes.
        metrics: Metrics that record the progress.
        seconds: Interval between two checks.
    """
    finished = threading.Event()

    def watch() -> None:
        last_size = _directory_size(directory)
        while not finished.wait(seconds):
            if (size := _directory_size(directory)) != last_size:
                metrics.record_progress()
            last_size = size

    thread = threading.Thread(target=watch, name="tfds-growth", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _directory_size(directory: Path) -> int:
    size = 0
    # TFDS may rename or delete a file during the traversal.
    with contextlib.suppress(OSError):
        for path in directory.rglob("*"):
            size += path.stat().st_size
    return size


def load_builder(name: str, data_dir: Path) -> Any:
    """Create the TFDS builder of a dataset.

    Args:
        name: `name[/config][:version]`.
        data_dir: Local directory for datasets.

    Returns:
        The builder, or the exception that explains why there is none.
    """
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (ValueError, AssertionError) as error:
        return error


def find_image_and_label(builder: Any) -> tuple[str, str]:
    """Find the image and label features: the supervised keys, or the only features of their type.

    Args:
        builder: A TFDS builder.

    Returns:
        Keys of the image and of the label.

    Raises:
        DataError: If it is not an image classification dataset.
    """
    features, keys = builder.info.features, builder.info.supervised_keys
    images = [name for name, feature in features.items() if type(feature) is tfds.features.Image]
    labels = [name for name, feature in features.items() if type(feature) is tfds.features.ClassLabel]
    if keys and len(keys) == 2 and keys[0] in images and keys[1] in labels:
        return keys[0], keys[1]
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    raise DataError(
        f"{builder.name} is not an image classification dataset: expected one Image and one ClassLabel feature, or "
        f"supervised_keys that select them. It has the images {images} and the labels {labels}."
    )


def read_label_names(builder: Any, label_key: str) -> list[str]:
    """Return the names of the labels of a TFDS dataset: "0", "1", … if it defines only their number.

    Raises:
        DataError: If it does not define its labels.
    """
    feature = builder.info.features[label_key]
    if feature.num_classes is None:
        raise DataError(f"The feature {label_key} of {builder.info.full_name} defines no classes, so it has no labels.")
    return list(feature.names)


def _is_retryable(error: BaseException) -> bool:
    """Return whether a retry may help. It does not if TFDS has already used up its own retries for a server."""
    return _is_network_error(error) and "Max retries exceeded" not in str(error)


def _is_network_error(error: BaseException) -> bool:
    """Return whether a download failed. Network libraries raise OSError without an errno; a full disk has one."""
    if isinstance(error, NonMatchingChecksumError | tfds.download.DownloadError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno is None
