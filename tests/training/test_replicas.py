"""Training on two replicas: same batches, losses and weights as on one, within float32 rounding."""

import json
import os

import numpy as np
import pytest

# 23 training and 11 validation images: not multiples of the batch size 6 or of 2 replicas.
SPLITS = {"train": "train[:23]", "validation": "train[23:34]", "test": "train[34:]"}

RUN = """
import json, os, sys
from pathlib import Path
import keras, numpy as np
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, StorageSettings
from topwork.cli.output.progress import NoProgress
from topwork.spec import TransferJob
from topwork.spec.optimizer import Optimizer
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.training.feature_cache.policy import FeatureCachePolicy
from topwork.training.plan import StageContext, TrainingPhase, TrainingPlan
from topwork.training.distribution.strategy import get_strategy
from topwork.training.trainer import train
from topwork.workspace import Workspace

replicas, out = int(sys.argv[1]), Path(sys.argv[2])
job = TransferJob.model_validate_json(os.environ["JOB"])
settings = StorageSettings(*os.environ["S3"].split())
workspace = Workspace(
    Storage(os.environ["URI"], settings), Metrics(), NoProgress(), Path(os.environ["SCRATCH"]), replicas=replicas
)

def weights(classifier):
    path = workspace.scratch / "end.keras"
    workspace.storage.download(classifier.key, path, classifier.file)
    return keras.models.load_model(path, compile=False).get_weights()

def build_normalized_model():
    image = keras.Input((32, 32, 3), name="image")
    pixels = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(4, 3, strides=2, name="convolution")(pixels)
    maps = keras.layers.ReLU(name="relu")(keras.layers.BatchNormalization(momentum=0.8, name="norm")(maps))
    features = keras.Model(pixels, maps, name="base")(keras.layers.Rescaling(1 / 255, name="input_scaling")(image))
    vector = keras.layers.GlobalAveragePooling2D(name="pooling")(features)
    return keras.Model(image, keras.layers.Dense(1, name="logits")(vector))

get_strategy(replicas)
dataset = pull(job, workspace)
transferred = transfer(job, dataset, workspace)
tuned = fine_tune(job, transferred, dataset, workspace)

def run(job, phase, feature_cache, **options):
    # The two runs have different numbers of epochs, and so different keys.
    plan = TrainingPlan("transfer", (phase,), 6, "auto", False, None, 1, feature_cache, **options)
    return train(StageContext(job, plan, f"{plan.epochs:016}", workspace), dataset, build_normalized_model)

optimizer = Optimizer(name="sgd", learning_rate=0.1, clipvalue=0.01)
other = job.model_copy(update={"metadata": job.metadata.model_copy(update={"name": "normalized"})})
normalized = run(other, TrainingPhase("all", 3, optimizer), FeatureCachePolicy(), train_batch_norm=True)
cached = TransferJob.model_validate_json(os.environ["CACHED_JOB"])
on_features = run(cached, TrainingPhase("none", 2, optimizer), FeatureCachePolicy(2, required=True))
assert workspace.metrics.registry.get_sample_value("topwork_replicas") == replicas
results = (tuned, normalized, on_features)
np.savez(out / f"{replicas}.npz", *(array for result in results for array in weights(result)))
(out / f"{replicas}.json").write_text(json.dumps([row for result in results for row in result.history]))
"""


@pytest.fixture(scope="module")
def run_on_one_and_two_replicas(tmp_path_factory, s3_settings, preloaded_python):
    """Run the same job on one and on two replicas, each in its own process."""
    return lambda job, cached_job: _run(
        job, cached_job, tmp_path_factory.mktemp("replicas"), s3_settings, preloaded_python
    )


def _run(job, cached_job, directory, settings, python):
    runs = []
    for replicas in (1, 2):
        scratch = directory / f"scratch-{replicas}"
        scratch.mkdir()
        env = {
            **os.environ,
            "JOB": job.model_dump_json(by_alias=True),
            "CACHED_JOB": cached_job.model_dump_json(by_alias=True),
            "S3": f"{settings.endpoint_url} {settings.access_key} {settings.secret_key}",
            "URI": f"{job.spec.storage}/{replicas}",
            "SCRATCH": str(scratch),
        }
        completed = python.run(["-c", RUN, str(replicas), directory], env=env)
        assert completed.returncode == 0, completed.stderr[-3000:]
        with np.load(directory / f"{replicas}.npz") as arrays:
            weights = [arrays[name] for name in arrays.files]
        runs.append((json.loads((directory / f"{replicas}.json").read_text()), weights))
    return runs


def test_two_replicas_train_like_one(run_on_one_and_two_replicas, make_job):
    job = make_job(
        dataset={**make_job().spec.dataset.model_dump(by_alias=True), "splits": SPLITS},
        augmentation={"flip": "both", "mixUp": 0.3},
        transfer={
            "train": "all", "epochs": 3, "batchSize": 6, "classWeights": "balanced",
            "optimizer": {"name": "sgd", "learningRate": 0.05, "momentum": 0.9, "clipnorm": 0.05},
        },
        fineTune={
            "epochs": 2, "keep": "last",
            "optimizer": {
                "name": "sgd", "learningRate": 0.001, "globalClipnorm": 0.05, "weightDecay": 0.01,
                "ema": {"momentum": 0.5},
            },
        },
    )  # fmt: skip
    cached_job = make_job(dataset=job.spec.dataset.model_dump(by_alias=True), augmentation={"flip": "both"})
    (one, weights_of_one), (two, weights_of_two) = run_on_one_and_two_replicas(job, cached_job)
    stages = [("transfer", 3), ("fine-tune", 2), ("transfer", 3), ("transfer", 2)]
    expected = [(stage, epoch) for stage, epochs in stages for epoch in range(1, epochs + 1)]
    assert [(row["stage"], row["epoch"]) for row in two] == expected
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
        np.testing.assert_allclose([row[name] for row in two], [row[name] for row in one], rtol=2e-4, err_msg=name)
    assert len({row["loss"] for row in one}) == len(one)
    for first, second in zip(weights_of_one, weights_of_two, strict=True):
        np.testing.assert_allclose(second, first, rtol=2e-4, atol=2e-5)


CLIPPING = """
import keras, numpy as np, tensorflow as tf
from topwork.spec.optimizer import Optimizer
from topwork.training.optimizers import make_optimizer
from topwork.training.distribution.strategy import get_strategy

strategy = get_strategy(4)
# The replicas have gradients of very different size and direction.
inputs = np.repeat(np.float32([[5, 1], [-3, 2], [0.1, 0], [0, -0.2]]), 2, axis=0)
labels = np.repeat(np.float32([[4], [7], [-1], [0]]), 2, axis=0)

def train(replicas, settings, scale_loss, steps=3, inputs=inputs):
    with strategy.scope() if replicas > 1 else tf.device("CPU:0"):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)])
        optimizer = make_optimizer(settings, steps_per_epoch=1, epochs=1, replicas=replicas, scale_loss=scale_loss)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    before = np.concatenate([weight.ravel() for weight in model.get_weights()])
    batches = tf.data.Dataset.from_tensor_slices((inputs, labels)).batch(8).repeat()
    model.fit(batches, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0)
    return np.concatenate([weight.ravel() for weight in model.get_weights()]) - before

for scale_loss in (False, True):
    for clipping in ({"clipnorm": 0.05}, {"global_clipnorm": 0.05}, {"clipvalue": 0.01, "ema": {"momentum": 0.5}}):
        settings = Optimizer(name="sgd", learning_rate=1.0, weight_decay=0.01, **clipping)
        one, four = (train(replicas, settings, scale_loss) for replicas in (1, 4))
        np.testing.assert_allclose(four, one, rtol=1e-4, atol=1e-6, err_msg=f"{clipping} {scale_loss}")

settings = Optimizer(name="sgd", learning_rate=1.0, global_clipnorm=0.05)
np.testing.assert_allclose(np.linalg.norm(train(4, settings, False, steps=1)), 0.05, rtol=1e-5)
# Only the last replica has an infinite gradient: the step is skipped, as on one device.
infinite = inputs.copy()
infinite[-1] = np.inf
assert not train(4, Optimizer(name="sgd", learning_rate=1.0), True, steps=1, inputs=infinite).any()
"""


def test_four_replicas_clip_and_scale_the_summed_gradient_like_one_device(preloaded_python):
    completed = preloaded_python.run(["-c", CLIPPING])
    assert completed.returncode == 0, completed.stderr[-3000:]
