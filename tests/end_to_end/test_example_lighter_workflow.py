"""examples/lighter-workflow.yaml: the frozen base runs once per augmented view, and only the head is trained."""

import numpy as np
import pytest
from tests.end_to_end.example_systems import are_identical, layer_weights


@pytest.fixture(scope="module")
def lighter(examples):
    examples.mirror_weights("Xception", side=71)
    examples.mirror_tfds("cats_vs_dogs", version="4.0.1", classes=("cat", "dog"), splits={"train": 100}, size=(80, 96))
    return examples.run_one(
        "lighter-workflow",
        "spec.dataset.imageSize=[75, 75]",
        "spec.transfer.epochs=6",
        "spec.transfer.batchSize=20",
        "spec.transfer.featureCache.views=2",
        "spec.publish.formats=[keras]",
    )


def test_example_caches_eight_augmented_views(examples):
    spec = examples.read("lighter-workflow").spec
    assert (spec.transfer.cache.use, spec.transfer.cache.views) == ("on", 8)
    assert (spec.augmentation.flip, spec.augmentation.rotation) == ("horizontal", 0.1)


def test_base_runs_once_per_view_and_its_features_are_cached(lighter):
    events = [event for event in lighter.events if event["message"] == "features computed"]
    assert [(event["stage"], event["views"], event["shape"]) for event in events] == [("transfer", 2, "2048")]
    assert len(lighter.history("transfer")) == 6


def test_views_of_an_image_differ(lighter):
    from topwork.data.batches import view_batches
    from topwork.model.augmentation import build_augmentation

    batches = view_batches(
        lighter.dataset.train,
        classes=2,
        batch_size=20,
        views=2,
        augment=build_augmentation(lighter.job.spec.augmentation),
        seed=lighter.job.spec.seed,
    )
    images = [batch.numpy() for batch in batches]
    first, second = np.concatenate(images[:2]), np.concatenate(images[2:])
    assert first.shape == second.shape == (40, 75, 75, 3)
    assert all(np.abs(image - other).mean() > 1 for image, other in zip(first, second, strict=True))


def test_transfer_trains_only_the_head(lighter, examples):
    (groups,) = lighter.parameter_counts("transfer")
    assert {name for name, (trainable, _) in groups.items() if trainable} == {"head"}
    before, after = (
        layer_weights(examples.backbones["Xception"]),
        layer_weights(lighter.model("transfer").get_layer("base")),
    )
    assert all(are_identical(before[name], after[name]) for name in before)


def test_head_trained_on_cached_features_works_on_the_base(lighter):
    validation = lighter.dataset.validation
    pixels = validation.load_images(np.arange(validation.size)).astype("float32")
    logits = lighter.model("transfer").predict(pixels, verbose=0)[:, 0]
    best = lighter.history("transfer")[lighter.stage_result("transfer").best_epoch - 1]
    loss = np.mean(np.logaddexp(0, logits) - validation.labels * logits)
    # Features are cached in half precision.
    assert best["validation_loss"] == pytest.approx(loss, rel=0.02)
    assert lighter.metrics["evaluation"]["images"] == 10
