"""Images of TensorFlow Datasets: downloaded by TFDS itself, or taken from a mirror in storage."""

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_datasets as tfds
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from topwork.artifacts import fetch_whole, read_manifest
from topwork.clients.prometheus.metrics import Metrics
from topwork.data.sources.source import Item, Room, slug
from topwork.data.tfds_mirror import ROOT, AskedName, fetch_facts, fetch_images, is_prepared, mirrored
from topwork.errors import DataError, UnavailableError
from topwork.workspace import Workspace

ATTEMPTS = 3
FIRST_WAIT_SECONDS = 5.0
LOOK_SECONDS = 10.0
# About 12 seconds for one file. With TFDS' own 10, a pod that has no way out holds its GPUs for 3 minutes more.
downloader.MAX_RETRIES = 6


class TfdsSource:
    """A dataset of the TFDS catalogue, or of any module that registers one."""

    def __init__(self, name: str, workspace: Workspace) -> None:
        self._workspace = workspace
        self._asked = AskedName.parse(name)
        self._folder = workspace.scratch / "pull" / "tfds"
        known = known_to_tfds(name, self._folder / "data")
        made = None if isinstance(known, Exception) else str(known.info.full_name)
        self._mirrored = self._asked.pick(mirrored(workspace.storage, self._asked.name), made)
        if self._mirrored:
            folder = fetch_facts(workspace.storage, self._mirrored, self._folder / "mirrored")
            self._builder = tfds.builder_from_directory(folder)
        elif isinstance(known, Exception):
            raise self._unknown(name, known) from known
        else:
            self._builder = known
        self._image, self._label = image_and_label(self._builder)
        self.name = slug(self._builder.info.full_name.rpartition("/")[0])

    def _unknown(self, name: str, error: Exception) -> DataError:
        if not isinstance(error, tfds.core.DatasetNotFoundError):
            return DataError(f"spec.dataset.source.tfds is {name}: {error}{self._others}")
        return DataError(
            f"spec.dataset.source.tfds is {name}, which TensorFlow Datasets {tfds.__version__} does not know. "
            f"Look it up at https://www.tensorflow.org/datasets/catalog, or bring a dataset of your own, prepared by "
            f"TFDS, into storage: {self._command} --data-dir DIR.{self._others}"
        )

    @property
    def mirrored(self) -> bool:
        """Whether the dataset is in storage, prepared."""
        return self._mirrored is not None

    def description(self) -> dict[str, Any]:
        """Name the dataset with its configuration and version."""
        return {"tfds": self._builder.info.full_name}

    def digest(self) -> str:
        """Stand for the dataset: a version of TFDS never changes its content."""
        return str(self._builder.info.full_name)

    def room(self) -> Room:
        """Tell what TFDS knows: its downloads, the dataset as it prepares it, and the images in it."""
        info = self._builder.info
        downloads = 0 if self._mirrored else int(info.download_size or 0)
        return Room(fetched=downloads + int(info.dataset_size or 0), images=int(info.dataset_size or 0))

    def class_names(self) -> tuple[str, ...]:
        """Classes in the order of the dataset's labels."""
        return tuple(self._builder.info.features[self._label].names)

    def splits(self) -> Mapping[str, int | None]:
        """Splits of the dataset, which is downloaded now."""
        return {name: int(split.num_examples) for name, split in self._prepared.info.splits.items()}

    def items(self, split: str) -> Iterator[Item]:
        """Yield the images in the order of the files."""
        options = tf.data.Options()
        options.autotune.enabled = False
        # Decoders are kept off: the encoded file is proved like any other.
        with tf.device("CPU:0"):
            dataset = self._prepared.as_dataset(
                split=split,
                decoders={self._image: tfds.decode.SkipDecoding()},
                shuffle_files=False,
                read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, options=options),
            )
        classes = self.class_names()
        for number, example in enumerate(dataset.as_numpy_iterator()):
            label = int(example[self._label])
            # -1 stands for an unknown label.
            name = classes[label] if label >= 0 else None
            yield Item(f"{split}/{number}", name, partial(bytes, example[self._image]))

    @cached_property
    def _prepared(self) -> Any:
        """The builder with its files on scratch."""
        if self._mirrored:
            self._workspace.progress.note("TFDS dataset", name=self._mirrored, mirror=True)
            fetch_images(self._workspace.storage, self._mirrored, self._folder / "mirrored")
            return self._builder
        downloads = self._folder / "downloads"
        found = self._fetch_downloads()
        if self._builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not found:
            instructions = self._builder.MANUAL_DOWNLOAD_INSTRUCTIONS.strip()
            raise DataError(
                f"{self._builder.name} must be downloaded by hand. {instructions} Put the files below "
                f"{self._mirror_uri}/manual/."
            )
        config = tfds.download.DownloadConfig(
            try_download_gcs=False, compute_stats="skip", manual_dir=downloads / "manual"
        )
        retrying = Retrying(
            retry=retry_if_exception(_is_worth_another_try),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(FIRST_WAIT_SECONDS),
            reraise=True,
        )
        self._workspace.progress.note("TFDS dataset", name=self._builder.info.full_name, mirror=found)
        tfds.disable_progress_bar()
        try:
            # TFDS prints to standard output, which belongs to the commands.
            with contextlib.redirect_stdout(io.StringIO()), growth_told(self._folder, self._workspace.metrics):
                retrying(self._builder.download_and_prepare, download_dir=downloads, download_config=config)
        except ImportError as error:
            raise DataError(
                f"{self._builder.name} can't be prepared: {error}. Add the module to the image, or hand the images in "
                f"as a folder, archive or table."
            ) from error
        except Exception as error:
            if not _is_of_the_network(error):
                raise
            raise UnavailableError(
                f"{self._builder.name} could not be downloaded, each file tried again and again: {error} Where there "
                f"is no internet, run `{self._command}` on a machine that has it, or copy the TFDS download folder of "
                f"such a machine to {self._mirror_uri}/.{self._others}"
            ) from error
        return self._builder

    @property
    def folder(self) -> Path:
        """Local folder of the prepared dataset, which is downloaded now."""
        return Path(self._prepared.data_dir)

    @property
    def _command(self) -> str:
        version = f":{self._asked.version}" if self._asked.version else ""
        config = f"/{self._asked.config}" if self._asked.config else ""
        return f"topwork mirror tfds {self._workspace.storage.uri} {self._asked.name}{config}{version}"

    @property
    def _others(self) -> str:
        others = mirrored(self._workspace.storage, self._asked.name)
        return f" Mirrored are {', '.join(others)}." if others else ""

    @property
    def _mirror(self) -> str:
        return f"{ROOT}/{self._builder.name}"

    @property
    def _mirror_uri(self) -> str:
        return self._workspace.storage.uri_of(self._mirror)

    def _fetch_downloads(self) -> bool:
        """Fetch the mirrored download folder, written whole or copied there by hand: TFDS checks what it holds."""
        storage, folder = self._workspace.storage, self._folder / "downloads"
        if read_manifest(storage, self._mirror):
            fetch_whole(storage, self._mirror, folder)
            return True
        found = False
        for stored in storage.list(f"{self._mirror}/"):
            path = folder / stored.key.removeprefix(f"{self._mirror}/")
            inside = path.resolve().is_relative_to(folder.resolve())
            if inside and not stored.key.endswith("/") and not is_prepared(stored.key):
                found = True
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.download(stored.key, path)
        return found


@contextlib.contextmanager
def growth_told(folder: Path, metrics: Metrics, seconds: float = LOOK_SECONDS) -> Iterator[None]:
    """Tell metrics that work goes on while a folder grows: TFDS itself says nothing of its hours of downloads.

    Args:
        folder: Where the block writes.
        metrics: Who is told.
        seconds: How often the folder is looked at.
    """
    ended = threading.Event()

    def watch() -> None:
        before = _bytes_below(folder)
        while not ended.wait(seconds):
            if (now := _bytes_below(folder)) != before:
                metrics.progress()
            before = now

    thread = threading.Thread(target=watch, name="tfds-growth", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bytes_below(folder: Path) -> int:
    size = 0
    # TFDS renames and deletes while this looks.
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            size += path.stat().st_size
    return size


def known_to_tfds(name: str, data_dir: Path) -> Any:
    """Ask TFDS for the builder of a dataset.

    Args:
        name: `name[/config][:version]`.
        data_dir: Local folder for datasets.

    Returns:
        The builder, or the exception that says why there is none.
    """
    try:
        return tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except (ValueError, AssertionError) as error:
        return error


def image_and_label(builder: Any) -> tuple[str, str]:
    """Find the image and its class: as the dataset is supervised, or the only ones of their kind.

    Args:
        builder: A builder of TFDS.

    Returns:
        Names of both features.

    Raises:
        DataError: If it is no dataset for image classification.
    """
    features, keys = builder.info.features, builder.info.supervised_keys
    images = [name for name, feature in features.items() if type(feature) is tfds.features.Image]
    labels = [name for name, feature in features.items() if type(feature) is tfds.features.ClassLabel]
    if keys and len(keys) == 2 and keys[0] in images and keys[1] in labels:
        return keys[0], keys[1]
    if len(images) == len(labels) == 1:
        return images[0], labels[0]
    raise DataError(
        f"{builder.name} is no dataset for image classification: expected one image and one class label, or that "
        f"supervised_keys name them. It has the images {images} and the labels {labels}."
    )


def _is_worth_another_try(error: BaseException) -> bool:
    """Tell a download that broke off or was damaged from a server that TFDS itself called ten times in vain."""
    return _is_of_the_network(error) and "Max retries exceeded" not in str(error)


def _is_of_the_network(error: BaseException) -> bool:
    """Tell a failed download, with an OSError of requests or urllib, from a full disk, which has a number."""
    if isinstance(error, NonMatchingChecksumError | tfds.download.DownloadError | ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno is None
