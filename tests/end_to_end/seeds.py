"""What the tests of the fourteen systems share: the examples, run as a user runs them, on one real storage.

The examples are shrunk by `--set` alone. Weights and datasets of the real names lie in the mirror, where
`topwork mirror` has put them: weights of an untrained model, and a few small pictures.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.tfds_datasets import prepare_dataset

from topwork.artifacts import read_manifest
from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage
from topwork.data.dataset_manifest import DatasetMetadata, StoredDataset
from topwork.data.local_dataset import LocalDataset, fetch_dataset
from topwork.registry.stage_results import Classifier, TrainingStage, read_stage_result
from topwork.spec import TransferJob
from topwork.spec.loading.loader import read_files
from topwork.workspace import Workspace

EXAMPLES = Path(__file__).parents[2] / "examples"
STORAGE = "s3://ml-artifacts/topwork"
# So few pictures that a small split may lack a class.
FEW = "spec.dataset.onMissingClass=allow"
FLOWERS = ("dandelion", "daisy", "tulips", "sunflowers", "roses")
# Trainable and frozen parameters of each layer group.
Groups = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Ran:
    """A job that was run: what it said and what it left in storage; `printed` is all that the command printed."""

    job: TransferJob
    notes: tuple[dict[str, Any], ...]
    summary: str
    printed: str
    storage: Storage
    folder: Path
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def done(self, stage: TrainingStage) -> Classifier:
        done = read_stage_result(self.storage, self.job.run, stage)
        assert done is not None, f"{stage} of {self.job.run} is not done"
        return done

    def rows(self, stage: TrainingStage) -> list[dict[str, Any]]:
        return self.done(stage).rows

    def model(self, stage: TrainingStage) -> Any:
        """The model that a stage stored: raw pixels in, logits out."""
        return self._load(self.done(stage).key)

    @property
    def published(self) -> Any:
        """The published model: raw pixels in, probabilities out."""
        return self._load(f"{self.version}/model.keras")

    @property
    def version(self) -> str:
        """Key of the published version."""
        uri = next(line.split()[1] for line in self.summary.splitlines() if line.startswith("  model "))
        return uri.removeprefix(f"{STORAGE}/")

    @cached_property
    def figures(self) -> dict[str, Any]:
        """`metrics.json` of the published version."""
        return json.loads(self.storage.read(f"{self.version}/metrics.json") or b"")

    @property
    def facts(self) -> DatasetMetadata:
        manifest = read_manifest(self.storage, self._dataset)
        assert manifest is not None
        return DatasetMetadata.model_validate(manifest.facts)

    @cached_property
    def data(self) -> LocalDataset:
        """The images as the stages saw them."""
        return self.data_of(self.job)

    def data_of(self, job: TransferJob) -> LocalDataset:
        """The images of the same dataset as the stages of another job would see them."""
        scratch = self.folder / job.run
        scratch.mkdir(exist_ok=True)
        workspace = Workspace(self.storage, Metrics(), NoProgress(), scratch)
        return fetch_dataset(StoredDataset(self._dataset, self.facts), job, workspace)

    @cached_property
    def counts(self) -> dict[str, dict[str, int]]:
        """Images by class and split, as the model card tells them."""
        card = (self.storage.read(f"{self.version}/card.md") or b"").decode().partition("## What it learned from")[2]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
        return {row[0]: dict(zip(rows[0][1:], map(int, row[1:]), strict=True)) for row in rows[2:]}

    def phases(self, stage: TrainingStage) -> list[Groups]:
        """What `topwork run` has said of the parameters of every layer group, once for each compilation."""
        phases: list[Groups] = []
        for note in self.notes:
            if note["message"] == "parameters" and note["stage"] == stage:
                if not phases or note["layers"] in phases[-1]:
                    phases.append({})
                phases[-1][note["layers"]] = (note["trainable"], note["frozen"])
        return phases

    def note(self, message: str) -> dict[str, Any]:
        return next(note for note in self.notes if note["message"] == message)

    @property
    def _dataset(self) -> str:
        return str(json.loads(self.storage.read(f"runs/{self.job.run}/pull/done.json") or b"")["dataset"])

    def _load(self, key: str) -> Any:
        import keras

        if key not in self._loaded:
            path = self.folder / "loaded.keras"
            self.storage.download(key, path)
            self._loaded[key] = keras.models.load_model(path, compile=False)
        return self._loaded[key]


class Seeds:
    """A machine with a storage and no internet, on which the examples are run, each once for the same `--set`."""

    def __init__(self, folder: Path, environment: Mapping[str, str], storage: Storage) -> None:
        self.folder, self.storage = folder, storage
        self._environment = dict(environment)
        self._ran: dict[tuple[str, ...], list[Ran]] = {}
        self._datasets: set[str] = set()
        self.given: dict[str, Any] = {}
        """The models whose weights lie in the mirror, by name."""

    def topwork(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "topwork", *map(str, arguments)],
            env=self._environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=1000,
            check=False,
        )

    def read(self, example: str, *overrides: str) -> TransferJob:
        """Read an example with one job."""
        ((_, job),) = read_files([EXAMPLES / f"{example}.yaml"], overrides)
        return job

    def run(self, examples: str, *overrides: str) -> list[Ran]:
        """Run all jobs of examples in one command; what was run before with the same overrides is not run again."""
        asked = (examples, *overrides)
        if asked not in self._ran:
            self._ran[asked] = list(self._run([EXAMPLES / f"{name}.yaml" for name in examples.split()], overrides))
        return self._ran[asked]

    def run_one(self, example: str, *overrides: str) -> Ran:
        (ran,) = self.run(example, *overrides)
        return ran

    def _run(self, files: list[Path], overrides: tuple[str, ...]) -> Iterator[Ran]:
        overrides = (FEW, *overrides)
        options = [word for override in overrides for word in ("--set", override)]
        ended = self.topwork("run", *files, *options, "--log-format", "json")
        assert ended.returncode == 0, f"{ended.stdout}{ended.stderr}"
        assert "Traceback" not in ended.stderr
        print(f"{ended.stderr}{ended.stdout}")
        notes = [json.loads(line) for line in ended.stderr.splitlines() if line.startswith("{")]
        begins = [index for index, note in enumerate(notes) if note["message"] == "run"] + [len(notes)]
        summaries = ended.stdout.partition("\n\n")[0].split("Published ")[1:]
        for number, (_, job) in enumerate(read_files(files, overrides)):
            assert notes[begins[number]]["name"] == job.run
            folder = self.folder / job.run
            folder.mkdir()
            said = tuple(notes[begins[number] : begins[number + 1]])
            yield Ran(job, said, f"Published {summaries[number]}", ended.stdout, self.storage, folder)

    def mirror_tfds(self, name: str, **pictures: Any) -> None:
        """Put a dataset of small pictures under a real name into the mirror, with its real classes and splits."""
        if name not in self._datasets:
            from topwork.data.tfds_mirror_writer import mirror_tfds

            self._datasets.add(name)
            prepare_dataset(self.folder / "tfds", name, **pictures)
            mirror_tfds(name, self.workspace, self.folder / "tfds")

    def mirror_flowers(self) -> None:
        """100 flowers of five kinds in one split, as tf_flowers has them."""
        self.mirror_tfds("tf_flowers", version="3.0.1", classes=FLOWERS, splits={"train": 100})

    def mirror_weights(self, *names: str, side: int = 32) -> None:
        """Put weights of untrained models into the mirror, as if they were those of ImageNet."""
        for name in names:
            if name not in self.given:
                from topwork.training.base_files import mirror_weights

                file = self.folder / f"{name}.weights.h5"
                self.given[name] = untrained(name, side)
                self.given[name].save_weights(file)
                mirror_weights(name, self.workspace, file)

    @property
    def workspace(self) -> Workspace:
        scratch = self.folder / "scratch"
        scratch.mkdir(exist_ok=True)
        return Workspace(self.storage, Metrics(), NoProgress(), scratch)


def untrained(application: str, side: int) -> Any:
    """A model of keras.applications without its head, and without training; the same each time.

    The statistics of its batch normalizations are those of a few images of noise: without any, what comes out of a deep
    model is nearly nothing, or far too much.
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


def values(model: Any) -> dict[str, list[np.ndarray]]:
    """Weights of a model's layers, those of nested models too, by place and kind: Keras numbers what has no name."""
    from topwork.model.layer_tree import leaf_layers

    layers = [layer for layer in leaf_layers(model) if layer.weights]
    return {f"{place:03} {type(layer).__name__}": layer.get_weights() for place, layer in enumerate(layers)}


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Whether arrays are the same in every bit."""
    return [array.tobytes() for array in one] == [array.tobytes() for array in other]


def picture(random: np.random.Generator, side: int, hue: tuple[int, int, int]) -> Image.Image:
    """A small picture of noise over a colour."""
    pixels = random.integers(0, 80, (side, side, 3)) + np.array(hue)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
