"""The stages of a job in this process, timed: prints one JSON line.

    python benchmarks/stages.py job.yaml STATE [--lists lists.json]

Seconds are those of transfer and of fine-tune from the stored dataset to the stored model: fetching, building, tracing,
features, all epochs with their validation, checkpoints and uploads; without the start of Python and TensorFlow. With
`--lists` the images of each split are written, for contenders that are to see the same; with `--base-weights` the
weights of the trained base.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from topwork.cli.runtime.environment import quiet_start, storage_at
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.progress import LineProgress
from topwork.spec.loading.loader import read_jobs
from topwork.workspace import Workspace


class Kept(LineProgress):
    """Keeps what is told of the feature cache."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}

    def note(self, message: str, **facts: Any) -> None:
        super().note(message, **facts)
        if "feature" in message or "precision" in message:
            self.facts |= facts


def save_base(storage: Storage, key: str, scratch: Path, target: Path) -> None:
    """Save the weights of a stored classifier's base."""
    import keras

    storage.download(key, scratch / "trained.keras")
    keras.models.load_model(scratch / "trained.keras", compile=False).get_layer("base").save_weights(target)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--lists", type=Path)
    parser.add_argument("--base-weights", type=Path)
    options = parser.parse_args()
    (job,) = read_jobs(options.job)
    scratch = options.state / f"scratch-{job.run}"
    scratch.mkdir(parents=True, exist_ok=True)
    progress = Kept()
    with storage_at(job.spec.storage, options.state) as storage, quiet_start():
        from topwork import pipeline
        from topwork.data.local_dataset import fetch

        workspace = Workspace(storage, Metrics(), progress, scratch)
        dataset = pipeline.run_pull(job, workspace)
        if options.lists:
            local = fetch(dataset, job, replace(workspace, scratch=options.state / "lists"))
            names = {name: getattr(local, name).names for name in ("train", "validation", "test")}
            options.lists.write_text(json.dumps(names))
        pipeline.begin(job, workspace)
        seconds, classifier = {}, None
        began = time.monotonic()
        classifier = pipeline.transfer(job, dataset, workspace)
        seconds["transfer"] = time.monotonic() - began
        if job.spec.fine_tune:
            began = time.monotonic()
            classifier = pipeline.fine_tune(job, classifier, dataset, workspace)
            seconds["fine-tune"] = time.monotonic() - began
        published = pipeline.publish(job, classifier, dataset, workspace)
        if options.base_weights:
            save_base(storage, classifier.key, scratch, options.base_weights)
    rows = [{name: row[name] for name in ("stage", "epoch", "seconds")} for row in classifier.history]
    accuracy = published.metrics["accuracy"]
    print(json.dumps({"seconds": seconds, "epochs": rows, "accuracy": accuracy, "facts": progress.facts}))


if __name__ == "__main__":
    main()
