"""Runs the specs in `examples/` like a user would, against a real S3 server, and reads their results.

`--set` overrides make the examples small. The mirror contains weights and datasets under their real names, stored by
`topwork mirror`: weights of untrained models, and a few small generated images.
"""

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.preloaded_python import PreloadedPython
from tests.tfds_datasets import prepare_dataset

from topwork.artifacts import read_manifest
from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import DatasetMetadata, StoredDataset
from topwork.data.local_dataset import LocalDataset, fetch_dataset
from topwork.registry.stage_results import Classifier, TrainingStage, read_run_result
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files
from topwork.workspace import Workspace

EXAMPLES = Path(__file__).parents[2] / "examples"
STORAGE = "s3://ml-artifacts/topwork"
# With so few images, a small split can lack a class.
ALLOW_MISSING_CLASSES = "spec.dataset.onMissingClass=allow"
FLOWERS = ("dandelion", "daisy", "tulips", "sunflowers", "roses")
# Trainable and frozen parameters of each layer group.
LayerGroupParameters = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class ExampleRun:
    """The run of one job of an example: its output and its results in storage.

    Attributes:
        job: The job.
        events: The job's log lines.
        summary: The job's summary on standard output.
        output: Standard output of the whole command, which may have run several jobs.
        storage: Storage of the run.
        directory: Directory for downloads.
    """

    job: TransferJob
    events: tuple[dict[str, Any], ...]
    summary: str
    output: str
    storage: Storage
    directory: Path
    _models: dict[str, Any] = field(default_factory=dict, repr=False)

    def stage_result(self, stage: TrainingStage) -> Classifier:
        result = read_run_result(self.storage, self.job.run, stage)
        assert result is not None, f"{stage} of {self.job.run} has no result"
        return result

    def history(self, stage: TrainingStage) -> list[dict[str, Any]]:
        """Return the metrics of each epoch."""
        return self.stage_result(stage).rows

    def model(self, stage: TrainingStage) -> Any:
        """Load the model that a stage stored: raw pixels to logits."""
        return self._load_model(self.stage_result(stage).key)

    @property
    def published_model(self) -> Any:
        """The published model: raw pixels to probabilities."""
        return self._load_model(f"{self.version_key}/model.keras")

    @property
    def version_key(self) -> str:
        """Key of the published version."""
        uri = next(line.split()[1] for line in self.summary.splitlines() if line.startswith("  model "))
        return uri.removeprefix(f"{STORAGE}/")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json` of the published version."""
        return json.loads(self.storage.read(f"{self.version_key}/metrics.json") or b"")

    @property
    def dataset_metadata(self) -> DatasetMetadata:
        manifest = read_manifest(self.storage, self._dataset_prefix)
        assert manifest is not None
        return DatasetMetadata.model_validate(manifest.facts)

    @cached_property
    def dataset(self) -> LocalDataset:
        """The images that the stages used."""
        return self.fetch_dataset(self.job)

    def fetch_dataset(self, job: TransferJob) -> LocalDataset:
        """Fetch the dataset of this run with the splits and image size of another job."""
        scratch = self.directory / job.run
        scratch.mkdir(exist_ok=True)
        workspace = Workspace(self.storage, Metrics(), NoProgress(), scratch)
        return fetch_dataset(StoredDataset(self._dataset_prefix, self.dataset_metadata), job, workspace)

    @cached_property
    def split_counts(self) -> dict[str, dict[str, int]]:
        """Number of images by class and split, from the model card."""
        card = (self.storage.read(f"{self.version_key}/card.md") or b"").decode().partition("## Training data")[2]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
        return {row[0]: dict(zip(rows[0][1:], map(int, row[1:]), strict=True)) for row in rows[2:]}

    def parameter_counts(self, stage: TrainingStage) -> list[LayerGroupParameters]:
        """Return the logged parameter counts of all layer groups, once per compilation of the model."""
        phases: list[LayerGroupParameters] = []
        for event in self.events:
            if event["message"] == "parameters" and event["stage"] == stage:
                if not phases or event["layers"] in phases[-1]:
                    phases.append({})
                phases[-1][event["layers"]] = (event["trainable"], event["frozen"])
        return phases

    def event(self, message: str) -> dict[str, Any]:
        return next(event for event in self.events if event["message"] == message)

    @property
    def _dataset_prefix(self) -> str:
        return str(json.loads(self.storage.read(f"runs/{self.job.run}/pull/done.json") or b"")["dataset"])

    def _load_model(self, key: str) -> Any:
        import keras

        if key not in self._models:
            path = self.directory / "model.keras"
            self.storage.download(key, path)
            self._models[key] = keras.models.load_model(path, compile=False)
        return self._models[key]


class ExampleRunner:
    """Runs examples with storage but without internet access, once for each set of overrides.

    Attributes:
        directory: Working directory of all commands.
        storage: The storage that the examples name.
        backbones: The models whose weights are in the mirror, by name.
    """

    def __init__(
        self, directory: Path, environment: Mapping[str, str], storage: Storage, python: PreloadedPython
    ) -> None:
        self.directory, self.storage = directory, storage
        self._python = python
        self.backbones: dict[str, Any] = {}
        self._environment = dict(environment)
        self._runs: dict[tuple[str, ...], list[ExampleRun]] = {}
        self._datasets: set[str] = set()

    def topwork(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return self._python.run(["-m", "topwork", *arguments], env=self._environment, cwd=self.directory, timeout=1000)

    def read(self, example: str, *overrides: str) -> TransferJob:
        """Read an example with one job."""
        ((_, job),) = read_files([EXAMPLES / f"{example}.yaml"], overrides)
        return job

    def run(self, examples: str, *overrides: str) -> list[ExampleRun]:
        """Run all jobs of examples in one command, or return the runs of an earlier call with the same arguments."""
        key = (examples, *overrides)
        if key not in self._runs:
            self._runs[key] = list(self._run([EXAMPLES / f"{name}.yaml" for name in examples.split()], overrides))
        return self._runs[key]

    def run_one(self, example: str, *overrides: str) -> ExampleRun:
        """Run an example with one job."""
        (run,) = self.run(example, *overrides)
        return run

    def _run(self, files: list[Path], overrides: tuple[str, ...]) -> Iterator[ExampleRun]:
        overrides = (ALLOW_MISSING_CLASSES, *overrides)
        options = [word for override in overrides for word in ("--set", override)]
        completed = self.topwork("run", *files, *options, "--log-format", "json")
        assert completed.returncode == 0, f"{completed.stdout}{completed.stderr}"
        assert "Traceback" not in completed.stderr
        print(f"{completed.stderr}{completed.stdout}")
        events = [json.loads(line) for line in completed.stderr.splitlines() if line.startswith("{")]
        starts = [index for index, event in enumerate(events) if event["message"] == "run"] + [len(events)]
        summaries = completed.stdout.partition("\n\n")[0].split("Published ")[1:]
        for number, (_, job) in enumerate(read_files(files, overrides)):
            run = events[starts[number]]["name"]
            assert run.startswith(f"{job.metadata.name}-")
            directory = self.directory / run
            directory.mkdir()
            job_events = tuple(events[starts[number] : starts[number + 1]])
            summary = f"Published {summaries[number]}"
            yield ExampleRun(job.as_run(run), job_events, summary, completed.stdout, self.storage, directory)

    def mirror_tfds(self, name: str, **dataset: Any) -> None:
        """Mirror a dataset of small images under the name of a real TFDS dataset, with its real classes and splits."""
        if name not in self._datasets:
            from topwork.data.tfds_mirror_writer import mirror_tfds

            self._datasets.add(name)
            prepare_dataset(self.directory / "tfds", name, **dataset)
            mirror_tfds(name, self._workspace, self.directory / "tfds")

    def mirror_flowers(self) -> None:
        """Mirror 100 images of five classes in one split under the name tf_flowers."""
        self.mirror_tfds("tf_flowers", version="3.0.1", classes=FLOWERS, splits={"train": 100})

    def mirror_weights(self, *names: str, side: int = 32) -> None:
        """Mirror the weights of untrained models in place of their ImageNet weights.

        Args:
            names: Names of models in keras.applications.
            side: Height and width of the images that the models are built for, in pixels.
        """
        for name in names:
            if name not in self.backbones:
                from topwork.training.base_files import mirror_weights_file

                file = self.directory / f"{name}.weights.h5"
                self.backbones[name] = build_untrained_backbone(name, side)
                self.backbones[name].save_weights(file)
                mirror_weights_file(name, self._workspace, file)

    @property
    def _workspace(self) -> Workspace:
        scratch = self.directory / "scratch"
        scratch.mkdir(exist_ok=True)
        return Workspace(self.storage, Metrics(), NoProgress(), scratch)


def build_untrained_backbone(application: str, side: int) -> Any:
    """Build a model of keras.applications without its top and with the same random weights each time.

    The batch normalization statistics come from a few images of noise: with the initial statistics, the activations of
    a deep model vanish or explode.
    """
    import keras

    from topwork.model.backbones import find_backbone, scale_inputs

    keras.utils.set_random_seed(3)
    model = getattr(keras.applications, application)(include_top=False, weights=None, input_shape=(side, side, 3))
    normalizations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in normalizations:
        layer.momentum = 0.0
    if normalizations:
        noise = np.random.default_rng(3).integers(0, 256, (8, side, side, 3)).astype(np.float32)
        model(scale_inputs(keras.ops.convert_to_tensor(noise), find_backbone(application).scaling), training=True)
    return model


def layer_weights(model: Any) -> dict[str, list[np.ndarray]]:
    """Return the weights of all layers, including nested ones.

    The keys are index and class, such as `000 Conv2D`, because Keras numbers layers without a name differently in each
    process.
    """
    from topwork.model.layer_tree import leaf_layers

    layers = [layer for layer in leaf_layers(model) if layer.weights]
    return {f"{index:03} {type(layer).__name__}": layer.get_weights() for index, layer in enumerate(layers)}


def are_identical(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether two lists of arrays are equal bit for bit."""
    return [array.tobytes() for array in one] == [array.tobytes() for array in other]


def random_image(random: np.random.Generator, side: int, color: tuple[int, int, int]) -> Image.Image:
    """Return a square image of a color with noise."""
    pixels = random.integers(0, 80, (side, side, 3)) + np.array(color)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
