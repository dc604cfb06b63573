"""A job that is killed and stopped many times has the same results, bit for bit, as an uninterrupted one.

The short version takes a few minutes. With TOPWORK_LONG=1, there are ten times as many interruptions, and every second
run trains on cached features. TOPWORK_CHAOS_SEED repeats the random choices of an earlier run, but timing still varies.
"""

import os
import random
import signal
import time

import boto3
import numpy as np
import pytest
from tests.chaos.interrupted_run import (
    BUCKET,
    EPOCH_ENDED,
    EVALUATED,
    MILESTONES,
    SPEC,
    STAGES,
    TRAINING_STARTED,
    Counts,
    JobRun,
    choose_moment,
    interruption_windows,
    make_job,
    write_images,
)
from tests.chaos.results import assert_identical_results, print_now

from topwork.clients.s3.storage import StorageSettings, create_bucket

LONG = os.environ.get("TOPWORK_LONG") == "1"
INTERRUPTIONS = {signal.SIGKILL: 200 if LONG else 20, signal.SIGTERM: 100 if LONG else 10}
# Maximum per run: a stage that resumes close to its end completes.
MAX_INTERRUPTIONS = {"pull": 6, "transfer": 13, "fine-tune": 15}
WITH_FEATURE_CACHE = {"fineTune": {**SPEC["fineTune"], "featureCache": {"use": "on", "views": 2}}}


@pytest.fixture(scope="module")
def settings(s3_settings: StorageSettings) -> StorageSettings:
    """Storage with object versioning, so that deleted checkpoints can be compared."""
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


def run_uninterrupted(run: JobRun) -> dict[str, dict[str, float]]:
    """Run all stages, and measure the interruption windows of each."""
    windows = {}
    for stage in STAGES:
        process = run.start(stage)
        reached = {"": process.started}
        while process.process.poll() is None:
            output = process.output
            reached |= {
                milestone: time.monotonic()
                for milestone in (TRAINING_STARTED, EPOCH_ENDED, EVALUATED)
                if milestone not in reached and milestone in output
            }
            time.sleep(0.02)
        assert process.process.returncode == 0, process.output
        run.counts.steps += process.count_steps()
        windows[stage] = interruption_windows(stage, reached, time.monotonic())
    return windows


def run_interrupted(
    run: JobRun, signals: list[int], windows: dict[str, dict[str, float]], generator: random.Random
) -> None:
    """Run all stages, and interrupt each at random moments with the remaining signals."""
    for stage in STAGES:
        for _ in range(MAX_INTERRUPTIONS[stage]):
            if not signals or run.is_done(stage):
                break
            trained = stage == "fine-tune" and run.storage.size(f"runs/{run.job.run}/fine-tune/done.json") is not None
            milestones = ("", EVALUATED, EVALUATED) if trained else MILESTONES[stage]
            milestone, seconds = choose_moment(milestones, windows[stage], generator)
            if run.interrupt(stage, signals[-1], milestone, seconds, to_group=generator.random() < 0.5):
                signals.pop()
        run.complete(stage)
        assert run.is_done(stage)


def assert_no_completed_stage_ran_again(run: JobRun) -> None:
    complete: set[str] = set()
    for process in run.processes:
        for line in process.lines:
            if line["message"] in {"epoch", "resumed", "parameters", "feature cache"}:
                assert line["stage"] not in complete, process.output
            if line["message"] == "done":
                complete.add("publish" if line["stage"] == "fine-tune" else line["stage"])
        complete |= {"pull"} if "transfer" in process.stage else set()
    versions = run.object_versions("")
    results = [run.result_key(stage) for stage in ("transfer", "fine-tune")]
    keys = [*results, f"runs/{run.job.run}/publish/done.json", "models/chaos/1/manifest.json"]
    assert [len(versions[key]) for key in keys] == [1] * len(keys)
    assert [key for key in versions if key.startswith("stages/") and key.endswith("/done.json")] == sorted(results)


@pytest.mark.timeout(4 * 3600 if LONG else 1800)
def test_job_interrupted_at_random_moments_has_the_results_of_an_uninterrupted_one(tmp_path, settings, capsys):
    seed = int(os.environ.get("TOPWORK_CHAOS_SEED") or random.SystemRandom().randrange(2**32))
    generator, started = random.Random(seed), time.monotonic()
    print_now(capsys, f"\nseed {seed}: set TOPWORK_CHAOS_SEED={seed} to repeat these random choices")
    images = write_images(tmp_path / "images")
    signals = [number for number, count in INTERRUPTIONS.items() for _ in range(count)]
    generator.shuffle(signals)
    references: dict[bool, tuple[JobRun, dict[str, dict[str, float]]]] = {}
    runs: list[JobRun] = []
    compared = np.zeros(2, int)
    while signals:
        use_cache = LONG and len(runs) % 2 == 1
        overrides = WITH_FEATURE_CACHE if use_cache else {}
        if use_cache not in references:
            name = f"reference-{use_cache}"
            reference = JobRun(make_job(images, f"s3://{BUCKET}/{name}", **overrides), tmp_path / name, settings)
            references[use_cache] = reference, run_uninterrupted(reference)
        reference, windows = references[use_cache]
        name = f"run-{len(runs)}"
        runs.append(JobRun(make_job(images, f"s3://{BUCKET}/{name}", **overrides), tmp_path / name, settings))
        run_interrupted(runs[-1], signals, windows, generator)
        assert_no_completed_stage_ran_again(runs[-1])
        compared += assert_identical_results(runs[-1], reference)
        wait_until(lambda: not runs[-1].orphans())
        repeated = runs[-1].counts.steps - reference.counts.steps
        print_now(capsys, f"{name}: {describe(runs[-1].counts)}; {repeated} of {reference.counts.steps} steps repeated")
    total = Counts()
    for run in runs:
        for key, count in run.counts.interruptions.items():
            total.interruptions[key] = total.interruptions.get(key, 0) + count
    print_now(
        capsys,
        f"total: {describe(total)} in {len(runs)} runs and {time.monotonic() - started:.0f} s; "
        f"{compared[0]} weights and {compared[1]} checkpoints with optimizer state are identical, bit for bit",
    )
    assert (total.total(signal.SIGKILL), total.total(signal.SIGTERM)) == (
        INTERRUPTIONS[signal.SIGKILL],
        INTERRUPTIONS[signal.SIGTERM],
    )
    assert {stage for stage, _ in total.interruptions} == set(STAGES)
    assert compared[1] > 0


def describe(counts: Counts) -> str:
    interruptions = sorted(counts.interruptions.items())
    return ", ".join(f"{count} {name} in {stage}" for (stage, name), count in interruptions) or "no interruption"


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
