"""Event files: written from the history, fetched, and shown by a real TensorBoard."""

import time
from itertools import pairwise
from pathlib import Path

import pytest
import tensorflow as tf
from structlog.testing import capture_logs
from tests.tracking.tensorboard_server import START_SECONDS, run_tensorboard

from topwork.cli.commands.track import EVENT_KEY
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.errors import SettingError
from topwork.tracking.event_files import EventFiles, encode_events
from topwork.tracking.run_record import RunRecord
from topwork.tracking.run_tracking import RunTracking, tracking_services

TAGS = ["accuracy", "images_per_second", "learning_rate", "loss", "seconds", "validation_loss"]
START = 1767312000.0


@pytest.fixture
def job(make_job):
    return make_job(tracking={"tensorboard": True})


@pytest.fixture
def follow(job, storage):
    """Follow a job as a process does, until it ends."""

    def follow(*progresses, run_storage=storage):
        tracking = RunTracking(job, run_storage, tracking_services(job, run_storage))
        for progress in progresses:
            tracking.report(job, progress)
        tracking.pause()

    return follow


def stored_files(storage, job):
    return {stored.key: storage.read(stored.key) for stored in storage.list(f"runs/{job.run}/events/")}


def test_file_has_one_event_per_epoch_with_all_values(tmp_path, progress_of):
    path = tmp_path / "events"
    path.write_bytes(encode_events(progress_of(2)))
    version, *epochs = list(tf.compat.v1.train.summary_iterator(str(path)))
    assert (version.file_version, version.wall_time) == ("brain.Event:2", START)
    assert [(event.step, event.wall_time) for event in epochs] == [(1, START + 1.5), (2, START + 3.0)]
    values = {value.tag: value.simple_value for value in epochs[1].summary.value}
    assert sorted(values) == TAGS
    assert (values["loss"], values["validation_loss"], values["images_per_second"]) == (0.5, 0.625, 100.0)


def test_file_begins_with_the_bytes_of_the_shorter_file(progress_of):
    files = [encode_events(progress_of(epochs)) for epochs in range(5)]
    assert all(longer.startswith(shorter) and longer != shorter for shorter, longer in pairwise(files))


def test_next_process_continues_the_same_file(follow, job, storage, progress_of):
    follow(progress_of(1), progress_of(2))
    (key,) = stored_files(storage, job)
    assert key == f"runs/{job.run}/events/transfer/events.out.tfevents.1767312000.topwork"
    follow(progress_of(3), progress_of(1, "fine-tune"))
    files = stored_files(storage, job)
    assert files == {
        key: encode_events(progress_of(3)),
        key.replace("transfer/", "fine-tune/"): encode_events(progress_of(1, "fine-tune")),
    }


def test_stage_that_starts_again_replaces_its_file(job, storage, progress_of):
    files, progress = EventFiles(storage), progress_of(2)
    files.send(RunRecord(job, {"transfer": progress}))
    again = progress.__class__(progress.stage, progress.started.replace(hour=5), progress.rows)
    EventFiles(storage).send(RunRecord(job, {"transfer": again}))
    assert list(stored_files(storage, job).values()) == [encode_events(again)]


def test_outage_of_storage_is_reported_and_does_not_stop_the_run(follow, storage, progress_of):
    settings = StorageSettings("http://127.0.0.1:1", "key", "secret", attempts=1)
    with capture_logs() as logs:
        follow(progress_of(1), progress_of(2), run_storage=Storage(storage.uri, settings))
    warnings = [(entry["event"], entry["service"]) for entry in logs if entry["log_level"] == "warning"]
    assert warnings == [("tracking interrupted", "TensorBoard"), ("tracking incomplete", "TensorBoard")]


def test_tensorboard_shows_fetched_files_and_new_epochs(follow, job, storage, command, tmp_path, progress_of):
    directory = tmp_path / "logs"
    follow(progress_of(2))
    result = command("track", "events", storage.uri, directory, job.run)
    assert result.stdout == f"Fetched 1 event file to {directory}. Show them: tensorboard --logdir {directory}\n"
    run = f"{job.run}/transfer"
    with run_tensorboard(directory) as tensorboard:
        assert tensorboard.tags() == {run: TAGS}
        assert tensorboard.scalars(run, "loss") == [(START + 1.5, 1, 1.0), (START + 3.0, 2, 0.5)]
        follow(progress_of(4))
        command("track", "events", storage.uri, directory)
        deadline = time.monotonic() + START_SECONDS
        while len(tensorboard.scalars(run, "loss")) < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert tensorboard.scalars(run, "accuracy") == [
            (START + 1.5 * epoch, epoch, pytest.approx(1 - 0.5 / epoch)) for epoch in (1, 2, 3, 4)
        ]


def test_fetched_file_grows_in_place_or_is_replaced(follow, job, storage, command, tmp_path, progress_of):
    follow(progress_of(1))
    command("track", "events", storage.uri, tmp_path)
    (path,) = Path(tmp_path).rglob("events.out.tfevents.*")
    before = path.stat().st_ino
    follow(progress_of(3))
    command("track", "events", storage.uri, tmp_path)
    assert (path.stat().st_ino, path.read_bytes()) == (before, encode_events(progress_of(3)))
    path.write_bytes(b"of another run")
    command("track", "events", storage.uri, tmp_path)
    assert path.read_bytes() == encode_events(progress_of(3))


def test_run_without_event_files_is_named(command, storage):
    with pytest.raises(SettingError, match="has no event files of tiny-00000000"):
        command("track", "events", storage.uri, "logs", "tiny-00000000")


@pytest.mark.parametrize("path", ["../events/transfer", "a/events/..", "a/events/b/..", "a/events/transfer/.."])
def test_names_in_storage_cannot_leave_the_directory(path):
    assert EVENT_KEY.fullmatch("runs/a/events/transfer/events.out.tfevents.1.topwork")
    assert not EVENT_KEY.fullmatch(f"runs/{path}/events.out.tfevents.1.topwork")
