"""A deep pretrained base, once frozen and once with everything trained, and what a step of each takes."""

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
def every(both):
    return both[1]


@pytest.fixture(scope="module")
def resnet(both, examples):
    return examples.backbones["ResNet50"]


def test_both_are_resnet50_with_imagenet_weights_at_224x224(both):
    from tests.end_to_end.example_systems import EXAMPLES

    from topwork.spec.loading.loader import read_jobs

    for job in read_jobs(EXAMPLES / "lab-3-resnet50.yaml"):
        base = job.spec.model.base
        assert (base.application, base.weights, job.spec.dataset.image_size) == ("ResNet50", "imagenet", (224, 224))
    assert [ran.job.spec.transfer.train for ran in both] == ["head", "all"]


def test_pooling_and_one_dense_layer_stand_on_the_base_without_its_top(both, resnet):
    for ran in both:
        base, *head = ran.model("transfer").layers[-3:]
        assert [type(layer).__name__ for layer in head] == ["GlobalAveragePooling2D", "Dense"]
        assert [type(layer) for layer in base.layers[1:]] == [type(layer) for layer in resnet.layers[1:]]


def test_frozen_every_weight_of_the_base_stays_what_it_was(frozen, resnet):
    (groups,) = frozen.parameter_counts("transfer")
    assert {name for name, (trainable, _) in groups.items() if trainable} == {"head"}
    given, kept = layer_weights(resnet), layer_weights(frozen.model("transfer").get_layer("base"))
    assert all(are_identical(kept[name], given[name]) for name in given)


def test_with_everything_trained_all_but_batch_normalization_moves(every, resnet):
    (groups,) = every.parameter_counts("transfer")
    assert all(trainable for trainable, _ in groups.values())
    given, trained = layer_weights(resnet), layer_weights(every.model("transfer").get_layer("base"))
    for name, before in given.items():
        assert are_identical(trained[name], before) == name.endswith("BatchNormalization"), name


def test_the_step_time_of_both_is_published(both):
    for ran in both:
        seconds = ran.metrics["stepSeconds"]["transfer"]
        # Of two epochs the faster one: the first holds the tracing of the graph.
        assert seconds == pytest.approx(min(40 / row["images_per_second"] for row in ran.history("transfer")))
        assert f"  a step  transfer {seconds:.3g} s" in ran.summary


def test_the_difference_in_step_time_is_reported_at_the_end(frozen, every):
    _, _, table = frozen.output.partition("\n\n")
    header, *rows = table.splitlines()
    assert header.split("   ")[0] == "MODEL"
    seconds = [ran.metrics["stepSeconds"]["transfer"] for ran in (frozen, every)]
    shown = [[f"{each:.3g}", f"{each / min(seconds):.2f}"] for each in seconds]
    told = {row.split()[0]: row.split()[-5:] for row in rows}
    assert told == {
        "lab-3-resnet50-frozen/1": ["transfer", "10,245", "40", *shown[0]],
        "lab-3-resnet50-all/1": ["transfer", "23,491,717", "40", *shown[1]],
    }
