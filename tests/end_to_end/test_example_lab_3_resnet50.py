"""examples/lab-3-resnet50.yaml: ResNet50 with a frozen and with a trained base, and their step times."""

import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights

OVERRIDES = (
    "spec.dataset.imageSize=[32, 32]",
    "spec.transfer.epochs=2",
    "spec.transfer.batchSize=40",
    "spec.publish.formats=[keras]",
    "spec.dataset.splits.validation=null",
)


@pytest.fixture(scope="module")
def both(examples):
    examples.mirror_flowers()
    examples.mirror_weights("ResNet50")
    return examples.run("lab-3-resnet50", *OVERRIDES)


@pytest.fixture(scope="module")
def frozen(both):
    return both[0]


@pytest.fixture(scope="module")
def unfrozen(both):
    return both[1]


@pytest.fixture(scope="module")
def resnet(both, examples):
    return examples.backbones["ResNet50"]


def test_both_jobs_use_resnet50_with_imagenet_weights_at_224x224(both):
    from tests.end_to_end.example_systems import EXAMPLES

    from topwork.spec.loading.loader import read_jobs

    for job in read_jobs(EXAMPLES / "lab-3-resnet50.yaml"):
        base = job.spec.model.base
        assert (base.application, base.weights, job.spec.dataset.image_size) == ("ResNet50", "imagenet", (224, 224))
    assert [run.job.spec.transfer.train for run in both] == ["head", "all"]


def test_head_is_pooling_and_one_dense_layer(both, resnet):
    for run in both:
        base, *head = run.model("transfer").layers[-3:]
        assert [type(layer).__name__ for layer in head] == ["GlobalAveragePooling2D", "Dense"]
        assert [type(layer) for layer in base.layers[1:]] == [type(layer) for layer in resnet.layers[1:]]


def test_frozen_base_keeps_all_weights(frozen, resnet):
    (groups,) = frozen.parameter_counts("transfer")
    assert {name for name, (trainable, _) in groups.items() if trainable} == {"head"}
    before, after = layer_weights(resnet), layer_weights(frozen.model("transfer").get_layer("base"))
    assert all(are_identical(after[name], before[name]) for name in before)


def test_unfrozen_base_changes_all_weights_except_batch_normalization(unfrozen, resnet):
    (groups,) = unfrozen.parameter_counts("transfer")
    assert all(trainable for trainable, _ in groups.values())
    before, after = layer_weights(resnet), layer_weights(unfrozen.model("transfer").get_layer("base"))
    for name in before:
        assert are_identical(after[name], before[name]) == name.endswith("BatchNormalization"), name


def test_step_time_of_both_jobs_is_published(both):
    for run in both:
        seconds = run.metrics["stepSeconds"]["transfer"]
        # The faster of two epochs: the first includes the tracing of the graph.
        assert seconds == pytest.approx(min(40 / row["images_per_second"] for row in run.history("transfer")))
        assert f"  step    transfer {seconds:.3g} s" in run.summary


def test_comparison_shows_both_step_times(frozen, unfrozen):
    _, _, table = frozen.output.partition("\n\n")
    header, *rows = table.splitlines()
    assert header.split("   ")[0] == "MODEL"
    seconds = [run.metrics["stepSeconds"]["transfer"] for run in (frozen, unfrozen)]
    expected = [[f"{value:.3g}", f"{value / min(seconds):.2f}"] for value in seconds]
    columns = {row.split()[0]: row.split()[-5:] for row in rows}
    assert columns == {
        "lab-3-resnet50-frozen/1": ["transfer", "10,245", "40", *expected[0]],
        "lab-3-resnet50-all/1": ["transfer", "23,491,717", "40", *expected[1]],
    }
