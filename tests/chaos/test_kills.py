"""A job whose processes are killed and stopped again and again ends as one that never was: bit for bit.

The short form takes some minutes; TOPWORK_LONG=1 kills ten times as often, and trains on features in every other run.
TOPWORK_CHAOS_SEED repeats the choice of moments of an earlier run, as far as the machine's own timing lets it.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest

# pytest imports each test file by itself: the module beside it is found by its folder.
sys.path.insert(0, str(Path(__file__).parent))
from killed import (
    BUCKET,
    EPOCH,
    EVALUATION,
    MARKS,
    SPEC,
    STAGES,
    TRAINING,
    Figures,
    Run,
    make_job,
    moment,
    pictures,
    spans,
)

from topwork.clients.s3.storage import StorageSettings, create_bucket

LONG = os.environ.get("TOPWORK_LONG") == "1"
HITS = {signal.SIGKILL: 200 if LONG else 20, signal.SIGTERM: 100 if LONG else 10}
# At most in one run: a stage that nears its end ends.
HITS_OF_A_STAGE = {"pull": 6, "transfer": 13, "fine-tune": 15}
ON_FEATURES = {"fineTune": {**SPEC["fineTune"], "featureCache": {"use": "on", "views": 2}}}


@pytest.fixture(scope="module")
def settings(s3_settings: StorageSettings) -> StorageSettings:
    """Storage that keeps every version of each object: also checkpoints that are gone can be compared."""
    create_bucket(s3_settings, BUCKET)
    client = boto3.client(
        "s3",
        endpoint_url=s3_settings.endpoint_url,
        aws_access_key_id=s3_settings.access_key,
        aws_secret_access_key=s3_settings.secret_key,
        region_name="us-east-1",
    )
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    return s3_settings


def uninterrupted(run: Run) -> dict[str, dict[str, float]]:
    """Run all stages, and measure for how many seconds after its marks each can be hit."""
    measured = {}
    for stage in STAGES:
        process = run.start(stage)
        seen = {"": process.started}
        while process.process.poll() is None:
            output = process.output
            seen |= {
                mark: time.monotonic() for mark in (TRAINING, EPOCH, EVALUATION) if mark not in seen and mark in output
            }
            time.sleep(0.02)
        assert process.process.returncode == 0, process.output
        run.figures.steps += process.steps_to_the_end()
        measured[stage] = spans(stage, seen, time.monotonic())
    return measured


def interrupted(run: Run, signals: list[int], measured: dict[str, dict[str, float]], chance: random.Random) -> None:
    """Run all stages, each hit by the signals that are left, at moments that chance chooses."""
    for stage in STAGES:
        for _ in range(HITS_OF_A_STAGE[stage]):
            if not signals or run.is_done(stage):
                break
            trained = stage == "fine-tune" and run.storage.size(f"runs/{run.job.run}/fine-tune/done.json") is not None
            marks = ("", EVALUATION, EVALUATION) if trained else MARKS[stage]
            mark, seconds = moment(marks, measured[stage], chance)
            if run.hit(stage, signals[-1], mark, seconds, whole_group=chance.random() < 0.5):
                signals.pop()
        run.end(stage)
        assert run.is_done(stage)


def assert_nothing_done_was_done_again(run: Run) -> None:
    done: set[str] = set()
    for process in run.processes:
        for line in process.lines:
            if line["message"] in {"epoch", "resumed", "parameters", "feature cache"}:
                assert line["stage"] not in done, process.output
            if line["message"] == "done":
                done.add("publish" if line["stage"] == "fine-tune" else line["stage"])
        done |= {"pull"} if "transfer" in process.stage else set()
    versions = run.versions("")
    marks = [key for key in versions if key.endswith(("/done.json", "models/chaos/1/manifest.json"))]
    assert {key.replace(run.job.run, "RUN"): len(versions[key]) for key in marks} == {
        **{f"runs/RUN/{stage}/done.json": 1 for stage in ("transfer", "fine-tune", "publish", "pull")},
        "models/chaos/1/manifest.json": 1,
    }


def assert_same(run: Run, reference: Run) -> tuple[int, int]:
    """Compare all that two runs left; says how many weights and checkpoints were compared."""
    assert run.keys() == reference.keys()
    weights = 0
    for stage in ("transfer", "fine-tune"):
        weights += assert_equal(run.weights(run.model(stage)), reference.weights(reference.model(stage)))
    weights += assert_equal(run.weights("models/chaos/1/model.keras"), reference.weights("models/chaos/1/model.keras"))
    for stage in ("transfer", "fine-tune"):
        one, other = (each.json(f"runs/{each.job.run}/{stage}/done.json") for each in (run, reference))
        assert [one["history"], one["best_epoch"]] == [other["history"], other["best_epoch"]]
    assert run.json("models/chaos/1/metrics.json") == reference.json("models/chaos/1/metrics.json")
    known = {name.partition("#")[0]: arrays for name, arrays in reference.checkpoints().items()}
    common = 0
    for name, arrays in run.checkpoints().items():
        if name.partition("#")[0] in known:
            assert any(group.startswith("optimizer/") for group in arrays)
            assert_equal(arrays, known[name.partition("#")[0]])
            common += 1
    return weights, common


def assert_equal(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> int:
    assert some.keys() == others.keys()
    assert some
    for name, values in some.items():
        assert values.dtype == others[name].dtype
        np.testing.assert_array_equal(values, others[name], err_msg=name)
    return len(some)


@pytest.mark.timeout(4 * 3600 if LONG else 1800)
def test_a_job_that_is_killed_and_stopped_at_random_ends_as_if_it_had_not_been(tmp_path, settings, capsys):
    seed = int(os.environ.get("TOPWORK_CHAOS_SEED") or random.SystemRandom().randrange(2**32))
    chance, began = random.Random(seed), time.monotonic()
    say(capsys, f"\nseed {seed}: TOPWORK_CHAOS_SEED={seed} chooses the same moments again")
    photos = pictures(tmp_path / "photos")
    signals = [number for number, count in HITS.items() for _ in range(count)]
    chance.shuffle(signals)
    references: dict[bool, tuple[Run, dict[str, dict[str, float]]]] = {}
    runs: list[Run] = []
    compared = np.zeros(2, int)
    while signals:
        on_features = LONG and len(runs) % 2 == 1
        overrides = ON_FEATURES if on_features else {}
        if on_features not in references:
            place = f"reference-{on_features}"
            reference = Run(make_job(photos, f"s3://{BUCKET}/{place}", **overrides), tmp_path / place, settings)
            references[on_features] = reference, uninterrupted(reference)
        reference, measured = references[on_features]
        place = f"run-{len(runs)}"
        runs.append(Run(make_job(photos, f"s3://{BUCKET}/{place}", **overrides), tmp_path / place, settings))
        interrupted(runs[-1], signals, measured, chance)
        assert_nothing_done_was_done_again(runs[-1])
        compared += assert_same(runs[-1], reference)
        wait_until(lambda: not runs[-1].left_running())
        say(capsys, f"{place}: {told(runs[-1].figures)}; steps repeated: {repeated(runs[-1], reference)}")
    total = Figures()
    for run in runs:
        for key, count in run.figures.hits.items():
            total.hits[key] = total.hits.get(key, 0) + count
    say(
        capsys,
        f"in all: {told(total)} in {len(runs)} runs and {time.monotonic() - began:.0f} s; {compared[0]} weights and "
        f"{compared[1]} checkpoints with their optimizers compared, bit for bit",
    )
    assert (total.of(signal.SIGKILL), total.of(signal.SIGTERM)) == (HITS[signal.SIGKILL], HITS[signal.SIGTERM])
    assert {stage for stage, _ in total.hits} == set(STAGES)
    assert compared[1] > 0


def repeated(run: Run, reference: Run) -> str:
    return f"{run.figures.steps - reference.figures.steps} of {reference.figures.steps}"


def told(figures: Figures) -> str:
    return ", ".join(f"{count} {name} in {stage}" for (stage, name), count in sorted(figures.hits.items())) or "no hit"


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        print(text, flush=True)


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
