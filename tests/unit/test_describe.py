"""`topwork describe` shows the layers, parameters and steps that the stages train."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from structlog.testing import capture_logs

from topwork.artifacts import write_artifact
from topwork.cli.commands.describe import describe
from topwork.cli.output.progress import NoProgress
from topwork.clients.prometheus.metrics import Metrics
from topwork.clients.s3.storage import Storage, create_bucket
from topwork.data.dataset_manifest import DatasetMetadata
from topwork.errors import DataError
from topwork.local.server import embedded_storage
from topwork.spec.loading.loader import read_files
from topwork.spec.yaml_output import dump_job
from topwork.stages.fine_tune import fine_tune
from topwork.stages.pull import pull
from topwork.stages.transfer import transfer
from topwork.workspace import Workspace

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = {"unfreeze": {"steps": [{"layers": n, "epochs": 1, "learningRate": 10**-n} for n in (3, 6)]}}


@pytest.fixture(autouse=True)
def no_storage(monkeypatch, tmp_path):
    """Hide storage credentials and the embedded storage of earlier runs on this machine."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TOPWORK_STATE", str(tmp_path / "state"))


@pytest.fixture
def configured_storage(monkeypatch, s3_settings):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_settings.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_settings.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_settings.secret_key)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def describe_json(capsys):
    """Describe jobs with `--json`."""

    def call(*files, sets=(), **options):
        describe(list(files), list(sets), as_json=True, **options)
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def write_job(make_job, tmp_path):
    def write(**overrides):
        path = tmp_path / "job.yaml"
        path.write_text(dump_job(make_job(**overrides)))
        return path

    return write


def application(name, weights="none"):
    return {"base": {"application": name, "weights": weights}, "head": {"dropout": 0.0}}


def run_training(job, workspace):
    """Train a job and return the logged parameter counts and feature cache decision of each stage."""
    with capture_logs() as lines:
        dataset = pull(job, workspace)
        fine_tune(job, transfer(job, dataset, workspace), dataset, workspace)
    counts = [
        (line["stage"], {name: value for name, value in line.items() if name not in ("event", "log_level", "stage")})
        for line in lines
        if line["event"] == "parameters"
    ]
    caches = {line["stage"]: (line["used"], line["reason"]) for line in lines if line["event"] == "feature cache"}
    return counts, caches


@pytest.mark.parametrize(
    "settings",
    [
        {
            "model": application("MobileNet"),
            "transfer": {"epochs": 2, "batchSize": 8, "featureCache": "on"},
            "fineTune": STEPS,
        },
        {"model": application("MobileNet"), "transfer": {"train": "all", "epochs": 1, "batchSize": 8}},
        {"transfer": {"train": "all", "epochs": 1, "batchSize": 8}},
    ],
    ids=["gradual unfreezing", "all of an untrained model", "cnn"],
)
def test_run_trains_what_describe_shows(settings, write_job, describe_json, workspace, configured_storage):
    path = write_job(**settings)
    before = describe_json(path, images=40, classes=2)[0]
    counts, caches = run_training(read_files([path])[0][1], workspace)
    assert [
        (stage["stage"], group) for stage in before["stages"] for phase in stage["phases"] for group in phase["layers"]
    ] == counts
    assert {
        stage["stage"]: (stage["featureCache"]["used"], stage["featureCache"]["reason"]) for stage in before["stages"]
    } == caches
    steps = workspace.metrics.registry.get_sample_value("topwork_steps_total")
    assert sum(stage["steps"] for stage in before["stages"]) == steps
    # The stored dataset results in the same description.
    after = describe_json(path)[0]
    assert after["data"].pop("dataset").startswith(workspace.storage.uri)
    assert before["data"].pop("dataset") is None
    planned, plan = before.pop("plan"), after.pop("plan")
    stages = ["pull", *(stage["stage"] for stage in before["stages"]), "publish"]
    assert (planned["reuses"], planned["runs"]) == ([], stages)
    assert (plan["reuses"], plan["runs"]) == (stages[:-1], ["publish"])
    assert planned["run"] == plan["run"] == before["run"]
    assert after == before


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_described(path, describe_json):
    for description in describe_json(path, images=10_000):
        assert description["stages"]
        # Models that another job must publish first are unavailable.
        assert (description["base"]["parameters"] is None) == description["base"]["name"].startswith("s3://")


def test_parameters_are_counted_for_each_step_of_gradual_unfreezing(describe_json):
    (description,) = describe_json(EXAMPLES / "lab-4-vgg16-gradual.yaml", classes=5, images=3670)
    first, second = description["stages"]
    assert [phase["trained"] for phase in (*first["phases"], *second["phases"])] == [
        "the head",
        "the head and the last 3 layers of the base",
        "the head and the last 6 layers of the base",
        "the head and the last 9 layers of the base",
        "the head and the last 13 layers of the base",
    ]
    head = 512 * 256 + 256 + 256 * 5 + 5
    blocks = [7_079_424, 5_899_776, 1_475_328, 221_440 + 38_720]
    assert first["phases"][0]["trainable"] == head
    assert [phase["trainable"] for phase in second["phases"]] == [head + sum(blocks[: n + 1]) for n in range(4)]
    assert [phase["frozen"] for phase in second["phases"]] == [sum(blocks[n + 1 :]) for n in range(4)]
    assert second["phases"][0]["layers"][-3:] == [
        {"layers": "base/block4", "trainable": 0, "frozen": 5_899_776},
        {"layers": "base/block5", "trainable": 7_079_424, "frozen": 0},
        {"layers": "head", "trainable": head, "frozen": 0},
    ]
    assert (second["stepsPerEpoch"], second["epochs"], second["steps"]) == (2936 // 32, 14, 14 * (2936 // 32))


def test_batch_norm_of_a_pretrained_base_stays_frozen(write_job, describe_json):
    fine = {"epochs": 1, "unfreeze": "all", "optimizer": {"learningRate": 1e-5}}
    path = write_job(model=application("ResNet50", "imagenet"), transfer={"epochs": 1}, fineTune=fine)
    (phase,) = describe_json(path)[0]["stages"][1]["phases"]
    # 26,560 normalized channels with four parameters each.
    assert phase["frozen"] == 4 * 26_560


def test_learning_rate_schedule_is_described(describe_json):
    sets = [
        "spec.transfer={epochs: 5, batchSize: 30, optimizer: {name: sgd, momentum: 0.9, learningRate: 0.2}}",
        "spec.transfer.optimizer.schedule={name: inverseTime, rate: 0.01}",
    ]
    path = EXAMPLES / "cats-vs-dogs.yaml"
    phase = describe_json(path, sets=[*sets, "spec.fineTune=null"], images=750)[0]["stages"][0]["phases"][0]
    assert phase["steps"] == 50
    assert phase["learningRate"] == {
        "peak": 0.2,
        "schedule": "inverseTime",
        "first": pytest.approx(0.2),
        "last": pytest.approx(0.2 / (1 + 0.01 * 49)),
    }
    unknown = describe_json(path, sets=[*sets, "spec.fineTune=null"])[0]["stages"][0]["phases"][0]
    assert unknown["steps"] is None
    assert unknown["learningRate"] == {"peak": 0.2, "schedule": "inverseTime", "first": None, "last": None}


def test_unknown_values_are_noted(write_job, capsys):
    path = write_job(model={"base": {"cnn": {"filters": [4, 8]}}, "head": {"hidden": [3], "dropout": 0.0}})
    describe([path])
    run = read_files([path])[0][1].run
    assert capsys.readouterr().out == (
        f"tiny (run {run})\n"
        "  base  CNN trained from scratch; 408 parameters, weights: random; images of 32x32 pixels "
        "(stretch), scaling: to 0..1\n"
        "  data  ? classes; images: ? train, ? validation, ? test\n"
        "  note  The number of classes is unknown until the dataset is pulled; the head is shown for 2. "
        "Use --classes N.\n"
        "  note  The numbers of training images and steps are unknown until the dataset is pulled. Use --images N.\n"
        "\n"
        "transfer: 2 epochs of ? steps, ? in total; batch size 8; loss auto\n"
        "  feature cache not used: featureCache is off\n"
        "  trains the head and all of the base; adam, learning rate 0.001; 2 epochs, ? steps\n"
        "    layers              trainable  frozen\n"
        "    base/convolution_1        112       0\n"
        "    base/convolution_2        296       0\n"
        "    head                       31       0\n"
        "    total                     439       0\n"
    )


def test_splits_per_class_need_only_the_number_of_classes(write_job, describe_json):
    splits = "spec.dataset.splits={perClass: {train: 100, test: 50}}"
    description = describe_json(write_job(), sets=[splits], classes=3)[0]
    assert description["data"]["images"] == {"train": 300, "test": 150}
    assert description["stages"][0]["steps"] == 2 * (300 // 8)
    assert description["stages"][0]["loss"] == "categorical_crossentropy"
    assert describe_json(write_job(), sets=[splits])[0]["data"]["images"] == {"train": None, "test": None}


def test_images_option_counts_the_train_split(write_job, describe_json):
    path = write_job()
    sets = ["spec.dataset.source={tfds: cifar10}", "spec.dataset.splits={train: 'train[:40%]', test: test}"]
    description = describe_json(path, sets=sets, images=50_000, classes=10)[0]
    assert description["data"]["images"] == {"train": 20_000, "test": None}


def test_fewer_images_than_a_batch_are_noted(write_job, describe_json):
    (description,) = describe_json(write_job(), images=10, classes=2)
    assert description["notes"] == ["transfer has fewer training images than its batchSize 8, so it will fail."]


def test_missing_layer_is_rejected_before_training(write_job, describe_json):
    fine = {"epochs": 1, "unfreeze": {"layers": 30}, "optimizer": {"learningRate": 1e-5}}
    with pytest.raises(DataError, match="requests the last 30 layers with weights, but the base has only 2"):
        describe_json(write_job(fineTune=fine))


def test_dataset_of_another_job_with_the_same_source_is_found(
    make_job, write_job, describe_json, workspace, configured_storage
):
    # Storage also contains a damaged manifest and one that topwork did not write.
    workspace.storage.write("datasets/cats/0000000000000000/manifest.json", b"{")
    workspace.storage.write(
        "datasets/dogs/0000000000000000/manifest.json", b'{"format": 1, "files": {}, "facts": {"name": 1}}'
    )
    pull(make_job(), workspace)
    (description,) = describe_json(write_job(seed=7), classes=5)
    assert description["data"]["classes"] == 2
    assert description["data"]["images"] == {"train": 24, "validation": 8, "test": 8}
    assert description["data"]["dataset"].startswith(f"{workspace.storage.uri}/datasets/photos/")
    assert description["notes"] == ["--classes 5 is ignored: the stored dataset has 2."]


def test_images_of_lists_are_counted(write_job, describe_json, workspace, configured_storage, two_class_folder):
    splits = {"train": {"list": workspace.storage.uri_of("train.txt")}, "test": {"list": "none.txt"}}
    source = {"folder": {"uri": str(two_class_folder)}}
    file = write_job(dataset={"source": source, "splits": splits, "imageSize": [32, 32]})
    workspace.storage.write("train.txt", b"# comment\nblue/01.png\nred/01.png\n")
    (description,) = describe_json(file)
    assert description["data"]["images"] == {"train": None, "test": None}
    assert "spec.dataset.splits.test.list is none.txt, which does not exist" in description["notes"][0]
    assert "spec.dataset.splits.test.list is none.txt" in description["plan"]["unknown"]
    sets = [f"spec.dataset.splits.test.list={workspace.storage.uri_of('test.txt')}"]
    workspace.storage.write("test.txt", b"blue/03.png")
    (description,) = describe_json(file, sets=sets)
    assert description["data"]["images"] == {"train": 2, "test": 1}


def test_whole_groups_are_noted_as_approximate(make_job, write_job, describe_json, workspace, configured_storage):
    splits = {"train": 0.8, "test": 0.2, "groupBy": {"regex": "0?([0-9]+)"}}
    dataset = make_job().spec.dataset.model_dump(mode="json", by_alias=True, exclude_none=True) | {"splits": splits}
    pull(make_job(dataset=dataset), workspace)
    (description,) = describe_json(write_job(dataset=dataset))
    assert description["data"]["images"] == {"train": 32, "test": 8}
    assert description["notes"] == ["The numbers of images are approximate: splits contain whole groups."]


def test_stored_tfds_dataset_is_found_by_name(write_job, describe_json, workspace, configured_storage, tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "features.json").write_text("{}")
    for config, classes in (("small", ("a", "b", "c")), ("large", ("a", "b", "c", "d"))):
        metadata = DatasetMetadata(
            name="plants",
            fingerprint=config,
            source={"tfds": f"plants/{config}/1.0.0"},
            class_names=classes,
            splits={"train": dict.fromkeys(classes, 100)},
            images=100 * len(classes),
            rejected=(),
            duplicates=0,
        )
        write_artifact(
            workspace.storage, f"datasets/plants/{config}", tmp_path / "files", metadata.model_dump(mode="json")
        )
    data_by_name = {
        name: describe_json(write_job(), sets=[f"spec.dataset.source={{tfds: {name}}}"])[0]["data"]
        for name in ("plants/small", "plants/large:1.0.0", "plants/large:2.0.0", "plants")
    }
    assert [data["classes"] for data in data_by_name.values()] == [3, 4, None, None]
    assert data_by_name["plants/small"]["images"] == {"train": 180, "validation": 60, "test": 60}


def save_model(path):
    image = keras.Input((32, 32, 3))
    maps = keras.layers.Conv2D(4, 3, name="block_1")(image)
    model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(maps)))
    model.save(path)
    return path


def test_saved_base_is_read_from_a_file(write_job, describe_json, tmp_path):
    path = save_model(tmp_path / "model.keras")
    before = path.read_bytes()
    sets = [f"spec.model.base={{saved: {{uri: {path}, cutAt: block_1}}}}", "spec.transfer={epochs: 1}"]
    (description,) = describe_json(write_job(), sets=sets, classes=2, images=1000)
    assert description["stages"][0]["phases"][0]["layers"] == [
        {"layers": "base/block_1", "trainable": 0, "frozen": 112},
        {"layers": "head", "trainable": 5, "frozen": 0},
    ]
    assert description["notes"] == []
    assert description["base"]["scaling"] == "none (pixels in 0..255)"
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("scaling", "shown"),
    [("zeroToOne", "to 0..1"), ("minusOneToOne", "to -1..1"), ("none", "none (pixels in 0..255)")],
)
def test_scaling_of_a_saved_base_is_shown(write_job, describe_json, tmp_path, scaling, shown):
    path = save_model(tmp_path / "model.keras")
    sets = [f"spec.model.base={{saved: {{uri: {path}, cutAt: block_1, scaling: {scaling}}}}}"]
    (description,) = describe_json(write_job(), sets=sets, classes=2, images=1000)
    assert description["base"]["scaling"] == shown


def test_saved_base_is_read_from_storage(write_job, describe_json, workspace, configured_storage, tmp_path):
    workspace.storage.upload(save_model(tmp_path / "model.keras"), "bases/model.keras")
    uri = workspace.storage.uri_of("bases/model.keras")
    (description,) = describe_json(write_job(), sets=[f"spec.model.base={{saved: {{uri: '{uri}', cutAt: block_1}}}}"])
    assert description["base"]["parameters"] == 112


def test_missing_saved_base_does_not_prevent_a_description(write_job, describe_json, workspace, configured_storage):
    uri = workspace.storage.uri_of("none.keras")
    (description,) = describe_json(
        write_job(), sets=[f"spec.model.base={{saved: {{uri: '{uri}'}}}}"], classes=2, images=100
    )
    assert description["notes"] == [
        f"spec.model.base.saved.uri is {uri}, and storage has no such object. Without it, the layers of the "
        "base are unknown."
    ]
    assert description["base"]["parameters"] is None
    (stage,) = description["stages"]
    assert (stage["stepsPerEpoch"], stage["featureCache"], stage["phases"][0]["layers"]) == (60 // 8, None, [])


def test_unreachable_storage_is_noted(write_job, describe_json, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    (description,) = describe_json(write_job(), classes=2, images=100)
    assert description["notes"][0].startswith("http://127.0.0.1:9 can't be reached for s3://")
    assert description["stages"][0]["phases"][0]["trainable"]


def test_embedded_storage_is_read_if_it_exists_and_never_created(write_job, describe_json, tmp_path):
    describe_json(write_job())
    assert not (tmp_path / "state").exists()
    path = write_job()
    ((_, job),) = read_files([path])
    with embedded_storage(tmp_path / "state") as settings:
        create_bucket(settings, "topwork-test")
        storage = Storage(job.spec.storage, settings)
        pull(job, Workspace(storage, Metrics(), NoProgress(), tmp_path))
    assert describe_json(path)[0]["data"]["classes"] == 2


DESCRIBE_AND_PRINT_MEMORY = """
import resource, sys
from topwork.cli import main
sys.argv = ["topwork", "describe", *sys.argv[1:]]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""


def test_largest_model_is_described_without_allocating_its_weights(write_job):
    path = write_job(model=application("ConvNeXtXLarge", "imagenet"), transfer={"epochs": 3})
    completed = subprocess.run(
        [sys.executable, "-c", DESCRIBE_AND_PRINT_MEMORY, path, "--set", "spec.transfer.epochs=4", "--classes", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0
    assert "transfer: 4 epochs of ? steps" in completed.stdout
    assert "  data  4 classes; images: ? train" in completed.stdout
    # Standard error contains only the peak memory in MiB: about 1,500, and 2,200 with weights.
    assert int(completed.stderr) < 1800
