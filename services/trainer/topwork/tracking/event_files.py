"""Event files for TensorBoard: `runs/<run>/events/<stage>/events.out.tfevents.<start of the stage>.topwork`.

Object storage cannot append to a file, so that each epoch replaces it. Its content depends on the history only: it
begins with the bytes that it had before, also after a restart, as a reader of a growing file expects.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from topwork.clients.s3.storage import Storage
from topwork.progress import StageProgress
from topwork.tracking.run_record import RunRecord, list_epochs

if TYPE_CHECKING:
    import tensorflow as tf

FILE_VERSION = "brain.Event:2"
"""First event of every file; see tensorflow/core/util/event.proto."""


def events_prefix(run: str) -> str:
    """Return the common prefix of the keys of all event files of a run."""
    return f"runs/{run}/events/"


def encode_events(progress: StageProgress) -> bytes:
    """Encode the history of a stage as an event file with one scalar per epoch and value. Requires TensorFlow.

    Args:
        progress: The epochs of the stage.

    Returns:
        The content of the file: TFRecords with `tensorflow.Event` messages.
    """
    import tensorflow as tf

    with tempfile.TemporaryDirectory(prefix="topwork-events-") as directory:
        path = Path(directory) / "events"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for event in _events(progress):
                writer.write(event.SerializeToString(deterministic=True))
        return path.read_bytes()


def _events(progress: StageProgress) -> "Iterator[tf.compat.v1.Event]":
    import tensorflow as tf

    yield tf.compat.v1.Event(wall_time=progress.started.timestamp(), file_version=FILE_VERSION)
    for epoch in list_epochs(progress):
        scalars = [tf.compat.v1.Summary.Value(tag=name, simple_value=value) for name, value in epoch.values.items()]
        summary = tf.compat.v1.Summary(value=scalars)
        yield tf.compat.v1.Event(wall_time=epoch.time, step=epoch.number, summary=summary)


class EventFiles:
    """Stores the event files of runs."""

    name = "TensorBoard"

    def __init__(self, storage: Storage) -> None:
        """Initialize the writer.

        Args:
            storage: Storage of the runs.
        """
        self._storage = storage
        self._stored: dict[str, bytes] = {}

    def send(self, record: RunRecord) -> None:
        """Store the event files of all stages of a run that have changed.

        Args:
            record: The run.

        Raises:
            UnavailableError: If storage cannot be reached.
        """
        for stage, progress in record.stages.items():
            directory = f"{events_prefix(record.job.run)}{stage}/"
            key = f"{directory}events.out.tfevents.{int(progress.started.timestamp())}.topwork"
            data = encode_events(progress)
            if self._stored.get(key) == data:
                continue
            self._storage.write(key, data)
            if key not in self._stored:
                # A stage that was started again replaces the file of the earlier attempt.
                others = [stored.key for stored in self._storage.list(directory) if stored.key != key]
                self._storage.delete(others)
            self._stored[key] = data
