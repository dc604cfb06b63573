"""A real MLflow server, and histories of runs that do not have to be trained."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from tests.tracking.mlflow_server import START_SECONDS, MlflowProcess

from topwork.cli.runtime.environment import configure_tracking
from topwork.progress import StageProgress
from topwork.spec.tracking import Mlflow, Tracking


@pytest.fixture(scope="session")
def mlflow_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowProcess]:
    server = MlflowProcess(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def mlflow(mlflow_process: MlflowProcess, monkeypatch: pytest.MonkeyPatch) -> MlflowProcess:
    """The running server, with limits that a busy machine does not exceed."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr("topwork.tracking.run_tracking.CLOSE_SECONDS", START_SECONDS)
    monkeypatch.setattr("topwork.tracking.run_tracking.STOP_SECONDS", START_SECONDS)
    configure_tracking(Tracking(mlflow=Mlflow(uri=mlflow_process.uri)))
    return mlflow_process


@pytest.fixture
def progress_of() -> Callable[..., StageProgress]:
    """Return a history of a number of epochs, which begins like every longer one."""

    def make(epochs: int, stage: str = "transfer", factor: float = 1.0) -> StageProgress:
        rows = tuple(
            {
                "stage": stage,
                "epoch": epoch,
                "loss": factor / epoch,
                "accuracy": 1 - 0.5 / epoch,
                "validation_loss": factor / epoch + 0.125,
                "learning_rate": 0.001,
                "seconds": 1.5,
                "images_per_second": 100.0,
            }
            for epoch in range(1, epochs + 1)
        )
        return StageProgress(stage, datetime(2026, 1, 2, tzinfo=UTC), rows)

    return make
