"""A trial of a search: its parameters, its results, and the runs that it consists of."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from topwork.spec import TransferJob

TrialState = Literal["running", "paused", "complete", "pruned", "failed"]
TRIAL_STATES: tuple[TrialState, ...] = ("running", "paused", "complete", "pruned", "failed")
FINAL_TRIAL_STATES: frozenset[TrialState] = frozenset({"complete", "pruned", "failed"})


@dataclass(frozen=True)
class TrialResult:
    """What a run of a trial resulted in.

    Attributes:
        epochs: Number of epochs of the last training stage that the run was allowed to train.
        run: Name of the run.
        value: Value of the metric of the search on the validation split.
        metrics: All metrics on the validation split.
        seconds: Duration of the run in seconds.
        gpu_seconds: Number of its GPUs times the seconds for which it held them.
        dataset: Identifies the images: key prefix of the stored dataset, and after a `#` a digest of the lists of the
            splits if there are any. Empty if unknown. Values on other images cannot be compared.
    """

    epochs: int
    run: str
    value: float
    metrics: dict[str, float]
    seconds: float
    gpu_seconds: float = 0.0
    dataset: str = ""

    @property
    def dataset_prefix(self) -> str:
        """Key prefix of the stored dataset; empty if unknown."""
        return self.dataset.partition("#")[0]


@dataclass(frozen=True)
class Trial:
    """A trial of a search.

    Attributes:
        number: Number of the trial, from 0.
        params: Value of each parameter, by its path in the template. Parameters whose condition is not met are missing.
        state: `running`: a run was started and has no result yet. `paused`: it trained some epochs and may be continued
            later. `complete`: it trained all epochs. `pruned`: it is not continued. `failed`: see `error`.
        epochs: Number of epochs that its latest run is allowed to train.
        results: Results of its runs, in order of their epochs.
        equal_to: Number of the earlier trial with the same parameters, whose results are those of this trial; None
            otherwise.
        error: Why it failed.
        started: When it was started.
        finished: When its latest run ended; None while one runs.
        seconds: Duration of all its runs in seconds, including one that failed. 0 if it repeats another trial.
        gpu_seconds: GPU seconds of all its runs.
    """

    number: int
    params: dict[str, Any]
    state: TrialState
    epochs: int
    results: tuple[TrialResult, ...] = ()
    equal_to: int | None = None
    error: str | None = None
    started: datetime | None = None
    finished: datetime | None = None
    seconds: float = 0.0
    gpu_seconds: float = 0.0

    @property
    def value(self) -> float | None:
        """Value of the metric after the most epochs; None without a result."""
        return self.results[-1].value if self.results else None


@dataclass(frozen=True)
class TrialRun:
    """A run that a coordinator has to carry out: a new trial, or the continuation of a paused one.

    Attributes:
        number: Number of the trial.
        epochs: Number of epochs of the last training stage.
        job: The job to run. It publishes nothing and keeps its last checkpoint if the trial can be continued.
    """

    number: int
    epochs: int
    job: TransferJob
