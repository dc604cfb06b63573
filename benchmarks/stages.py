"""Runs the stages of a job in this process and prints their durations as one JSON line.

    python benchmarks/stages.py job.yaml STATE [--splits splits.json] [--base-weights base.weights.h5]

The durations of transfer and fine-tune include downloading the dataset, building and tracing the model, feature
computation, training, validation, checkpoints and uploads, but not the start of Python and TensorFlow. `--splits`
writes the image names of each split, so that other programs can train on the same images. `--base-weights` writes the
weights of the trained base.
"""

import argparse
import json
import time
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from topwork.cli.output.progress import NoProgress
from topwork.cli.runtime.logging import configure_logging
from topwork.cli.runtime.storage import open_storage
from topwork.cli.runtime.tensorflow_import import quiet_tensorflow_import
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.spec.loading.loader import read_jobs
from topwork.workspace import Workspace


def record_facts(facts: dict[str, Any]) -> None:
    """Log to standard error, and collect the fields of events about the feature cache and precision."""

    def collect(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if "feature" in event["event"] or "precision" in event["event"]:
            facts.update({name: value for name, value in event.items() if name != "event"})
        return event

    configure_logging()
    structlog.configure(processors=[collect, *structlog.get_config()["processors"]])


def save_base(storage: Storage, key: str, scratch: Path, target: Path) -> None:
    """Save the weights of the base of a stored classifier."""
    import keras

    storage.download(key, scratch / "trained.keras")
    keras.models.load_model(scratch / "trained.keras", compile=False).get_layer("base").save_weights(target)


def main() -> None:
    """Run the stages and print their durations."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--splits", type=Path)
    parser.add_argument("--base-weights", type=Path)
    options = parser.parse_args()
    (job,) = read_jobs(options.job)
    scratch = options.state / f"scratch-{job.run}"
    scratch.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    record_facts(facts)
    with open_storage(job.spec.storage, options.state) as storage, quiet_tensorflow_import():
        from topwork import pipeline
        from topwork.data.local_dataset import fetch_dataset

        workspace = Workspace(storage, Metrics(), NoProgress(), scratch)
        dataset = pipeline.run_pull(job, workspace)
        if options.splits:
            local = fetch_dataset(dataset, job, replace(workspace, scratch=options.state / "splits"))
            names = {name: getattr(local, name).names for name in ("train", "validation", "test")}
            options.splits.write_text(json.dumps(names))
        pipeline.prepare_training(job, workspace)
        seconds, classifier = {}, None
        start = time.monotonic()
        classifier = pipeline.transfer(job, dataset, workspace)
        seconds["transfer"] = time.monotonic() - start
        if job.spec.fine_tune:
            start = time.monotonic()
            classifier = pipeline.fine_tune(job, classifier, dataset, workspace)
            seconds["fine-tune"] = time.monotonic() - start
        published = pipeline.publish(job, classifier, dataset, workspace)
        if options.base_weights:
            save_base(storage, classifier.key, scratch, options.base_weights)
    rows = [{name: row[name] for name in ("stage", "epoch", "seconds")} for row in classifier.history]
    accuracy = published.metrics["accuracy"]
    print(json.dumps({"seconds": seconds, "epochs": rows, "accuracy": accuracy, "facts": facts}))


if __name__ == "__main__":
    main()
