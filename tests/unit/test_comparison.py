"""The comparison table at the end of `topwork run`, and the summary of a published version."""

from datetime import UTC, datetime, timedelta

from topwork.cli.output.comparison import format_comparison
from topwork.clients.prometheus.metrics import Metrics
from topwork.stages.publish import Published, StageCost


def published(name: str, accuracy: float, **stages: StageCost) -> Published:
    return Published(
        name=name,
        version=1,
        uri=f"s3://ml-artifacts/topwork/models/{name}/1",
        report_uri=f"s3://ml-artifacts/topwork/models/{name}/1/report.html",
        metrics={"accuracy": accuracy, "loss": 0.3},
        split="test",
        images=100,
        stages={stage.replace("_", "-"): cost for stage, cost in stages.items()},
    )


def cost(trainable: int, step_seconds: float | None, batch_size: int = 32) -> StageCost:
    return StageCost(trainable=trainable, batch_size=batch_size, step_seconds=step_seconds)


def test_comparison_shows_seconds_per_step_of_each_job():
    frozen = published("frozen", 0.9, transfer=cost(10_245, 0.5))
    every = published("every", 0.95, transfer=cost(23_544_837, 2.0))
    assert list(format_comparison([frozen, every])) == [
        "",
        "MODEL      METRIC            STAGE      TRAINABLE    BATCH SIZE   SECONDS PER STEP   RELATIVE TO FASTEST",
        "frozen/1   accuracy 0.9000   transfer   10,245       32           0.5                1.00",
        "every/1    accuracy 0.9500   transfer   23,544,837   32           2                  4.00",
    ]


def test_comparison_is_per_stage_and_independent_of_batch_size():
    one = published("one", 0.9, transfer=cost(10, 1.0), fine_tune=cost(99, 3.0))
    two = published("two", 0.9, transfer=cost(10, 1.0, batch_size=64), fine_tune=cost(99, 4.5, batch_size=16))
    ratios = [line.split()[-1] for line in list(format_comparison([one, two]))[2:]]
    assert ratios == ["2.00", "1.00", "1.00", "3.00"]


def test_comparison_leaves_unmeasured_cells_empty():
    lines = list(format_comparison([published("one", 0.9, transfer=cost(10, None)), published("two", 0.9)]))
    assert lines[2:] == ["one/1   accuracy 0.9000   transfer   10          32", "two/1   accuracy 0.9000"]


def test_comparison_of_a_single_model_is_empty():
    assert list(format_comparison([published("one", 0.9, transfer=cost(10, 1.0))])) == []


def test_comparison_and_summary_show_classes_without_test_images():
    partial = published("one", 0.9).model_copy(update={"excluded_classes": 2, "metrics": {"f1": 0.9}})
    complete = published("two", 0.8).model_copy(update={"metrics": {"f1": 0.8}})
    assert [line.rstrip() for line in format_comparison([partial, complete])][2:] == [
        "one/1   f1 0.9000 (without 2 classes)",
        "two/1   f1 0.8000",
    ]
    assert "  classes 2 without images in the test split, not part of averaged metrics" in partial.summary()


def test_comparison_of_accuracy_mentions_no_excluded_classes():
    partial = published("one", 0.9).model_copy(update={"excluded_classes": 2})
    assert not any("without" in line for line in format_comparison([partial, published("two", 0.8)]))


def test_summary_contains_seconds_per_step():
    one = published("one", 0.9, transfer=cost(10, 0.51234), fine_tune=cost(99, 3.0))
    assert one.summary()[-1] == "  step    transfer 0.512 s, fine-tune 3 s"
    assert len(published("two", 0.9).summary()) == 3


def test_summary_contains_the_input_wait_share():
    slow = StageCost(trainable=10, batch_size=32, step_seconds=0.5, input_wait_share=0.456)
    lines = published("one", 0.9, transfer=slow, fine_tune=cost(99, 3.0)).summary()
    assert lines[-1] == "  input   transfer waited for input 46 % of the time"


def test_earlier_published_version_restores_its_metrics():
    started, metrics = datetime(2026, 5, 1, tzinfo=UTC), Metrics()
    earlier = published("one", 0.9).model_copy(update={"started": started, "finished": started + timedelta(minutes=2)})
    with metrics.track_stage("publish"):
        earlier.restore_metrics(metrics)
    series = metrics.registry.get_sample_value
    assert series("topwork_metric", {"name": "accuracy", "split": "test"}) == 0.9
    assert series("topwork_loss", {"split": "test"}) == 0.3
    assert series("topwork_gates_failed") == 0
    assert series("topwork_stage_duration_seconds", {"stage": "publish"}) == 120
