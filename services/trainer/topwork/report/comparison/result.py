"""The result of a comparison, which `topwork compare --json` prints."""

from pydantic import Field

from topwork.report.evaluation import MetricsSection


class Estimate(MetricsSection):
    """A metric, or a difference of two, with its confidence interval.

    Attributes:
        value: The measured value.
        low: Lower bound of the interval; None if it cannot be estimated.
        high: Upper bound of the interval; None if it cannot be estimated.
    """

    value: float
    low: float | None = None
    high: float | None = None


class TrainedStage(MetricsSection):
    """Cost of a training stage.

    Attributes:
        stage: transfer or fine-tune.
        epochs: Number of its epochs.
        seconds: Total duration of its epochs.
        step_seconds: Duration of a typical step; None if it was not measured.
        batch_size: Global batch size.
    """

    stage: str
    epochs: int
    seconds: float
    step_seconds: float | None
    batch_size: int


class ComparedModel(MetricsSection):
    """A compared model.

    Attributes:
        name: Its name in the comparison: `cats/3`, or the name of a run.
        uri: URI of the version or the run.
        run: Run that trained it.
        dataset: URI of its dataset.
        images: Number of images of each of its splits.
        metrics: Metrics on the images of the comparison, by name; undefined ones are missing.
        stages: Cost of its training stages.
        gpus: Number of GPUs on all nodes, by its spec.
        model_bytes: Size of the trained model file; None if there is none.
    """

    name: str
    uri: str
    run: str
    dataset: str
    images: dict[str, int]
    metrics: dict[str, Estimate]
    stages: tuple[TrainedStage, ...]
    gpus: int
    model_bytes: int | None


class ChangedImage(MetricsSection):
    """An image that only one of two models classifies correctly.

    Attributes:
        name: Name of the image in the source.
        true_class: Its class.
        before: Class that the first model predicted.
        before_confidence: Probability of that class.
        after: Class that the other model predicted.
        after_confidence: Probability of that class.
        index: Its position among the images of the comparison.
    """

    name: str
    true_class: str
    before: str
    before_confidence: float
    after: str
    after_confidence: float
    index: int = Field(exclude=True)


class Difference(MetricsSection):
    """Differences of a model from the first one.

    Attributes:
        name: Name of the model.
        metrics: Its metrics minus those of the first model, by name.
        newly_correct: Number of images that only this model classifies correctly.
        newly_misclassified: Number of images that only the first model classifies correctly.
        p_value: Of McNemar's exact test, two-sided: whether one of the two is right more often.
        corrected_p_value: The same, corrected for the number of models by Holm's method.
        correct_images: Newly correct images, the most confident prediction first; at most `MAX_IMAGES`.
        misclassified_images: Newly misclassified images, the most confident prediction first; at most `MAX_IMAGES`.
        spec: Keys of the spec that differ, such as `spec.transfer.epochs: 5 → 10`.
        dataset: How the dataset differs; empty if it is the same.
    """

    name: str
    metrics: dict[str, Estimate]
    newly_correct: int
    newly_misclassified: int
    p_value: float
    corrected_p_value: float
    correct_images: tuple[ChangedImage, ...]
    misclassified_images: tuple[ChangedImage, ...]
    spec: tuple[str, ...]
    dataset: str


class Comparison(MetricsSection):
    """Models compared on the same images.

    Attributes:
        format: Version of this format.
        images: Number of images.
        described: The images in words, such as `400 images of the test split of cats/3`.
        split: Name of the split.
        class_names: Name of each class.
        confidence: Confidence level of the intervals.
        notes: Caveats, in sentences.
        models: The models; the others are compared with the first one.
        differences: Differences of each other model from the first one.
    """

    format: int = 1
    images: int
    described: str
    split: str
    class_names: tuple[str, ...]
    confidence: float
    notes: tuple[str, ...]
    models: tuple[ComparedModel, ...]
    differences: tuple[Difference, ...]
