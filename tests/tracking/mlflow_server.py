"""A real MLflow server in a process of its own, with a SQLite database."""

import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from tests.monitoring.prometheus_server import ROOT, free_port

COMMAND = ROOT / ".venv-mlflow" / "bin" / "mlflow"
START_SECONDS = 120


class MlflowProcess:
    """The server; it can be stopped and started again at the same address, with the same content."""

    def __init__(self, directory: Path) -> None:
        if not COMMAND.exists():
            pytest.skip("needs an MLflow server: run make test-tracking")
        self._directory, self._port = directory, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        database = f"sqlite:///{self._directory / 'mlflow.db'}"
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [COMMAND, "server", *arguments, "--backend-store-uri", database], cwd=self._directory,
                stdout=log, stderr=log, start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "HOME": str(self._directory), "MLFLOW_DISABLE_TELEMETRY": "true",
                     "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._is_healthy():
            assert self._process.poll() is None and time.monotonic() < deadline, self._log()
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process:
            subprocess.run(["kill", "-9", "--", f"-{self._process.pid}"], check=False)
            self._process.wait()
            self._process = None

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def _log(self) -> str:
        return (self._directory / "server.log").read_text()

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def runs(self, experiment: str) -> list[Run]:
        """Return all runs of an experiment, the oldest first."""
        found = self.client.get_experiment_by_name(experiment)
        order = ["attributes.start_time ASC"]
        return list(self.client.search_runs([found.experiment_id], order_by=order)) if found else []

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        """Return all values of a metric with their steps, also repeated ones."""
        points = self.client.get_metric_history(run.info.run_id, metric)
        return sorted((point.step, point.value) for point in points)
