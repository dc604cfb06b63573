"""Where the time of a job goes: computing, and everything else.

    python benchmarks/overhead.py            prints a table of a small and a large job

Both jobs train EfficientNet-Lite0 on images of solar cells: the small one is that of `make demo`, a head on frozen
features of 200 images; the large one then also trains all layers, on 600 images. Each runs in a new process with
`topwork run` and the embedded S3 server. Time is wall time from the start of the process. A phase excludes the phases
within it. Computing is the features of the frozen base, the training steps except the first of each phase, and
validation.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SMALL: tuple[str, ...] = ("metadata.name=overhead-small",)
LARGE = (
    "metadata.name=overhead-large",
    "spec.dataset.splits.perClass={train: 300, validation: 50, test: 50}",
    "spec.fineTune={epochs: 24, unfreeze: all, batchSize: 20, optimizer: {learningRate: 0.0001}}",
)
IMPORT, FIRST_STEPS, STEPS = "import of TensorFlow, Keras and topwork", "first steps (tracing)", "training steps"
FEATURES, VALIDATION, OTHER = "features of the frozen base", "validation", "other"
COMPUTING = (FEATURES, STEPS, VALIDATION)
# Functions of each phase, as `module.name`; functions that are imported where they are used are named there.
PHASES = {
    "storage check, source and dataset": ("topwork.pipeline.check_operations", "topwork.pipeline.pull"),
    "decoding into the pixel cache": ("topwork.data.local_dataset.cache_pixels",),
    "check of the export formats": (
        "topwork.stages.transfer.check_exportable",
        "topwork.stages.fine_tune.check_exportable",
    ),
    FEATURES: ("topwork.training.trainer.prepare_inputs",),
    VALIDATION: ("topwork.training.validation.Validation.evaluate",),
    "evaluation": ("topwork.report.held_out_evaluation.evaluate_classifier",),
    "export": ("topwork.model.export.export_model",),
    "check of the export": ("topwork.report.export_check.CheckProcess.check",),
    "report and model card": ("topwork.stages.publish.render_report", "topwork.stages.publish.render_model_card"),
    "uploads": ("topwork.stages.publish.write_artifact", "topwork.training.trainer.store_stage_result"),
}


class Stopwatch:
    """Measures phases that may contain each other. For one thread.

    Attributes:
        seconds: Wall time of each phase, without the phases within it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def measured(self, phase: str | Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its calls measured as a phase, which may depend on the arguments."""

        def measure(*arguments: Any, **options: Any) -> Any:
            name = phase if isinstance(phase, str) else phase(*arguments)
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return measure


def seconds_since_process_start() -> float:
    """Return the age of this process in seconds (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run_measured(overrides: list[str]) -> None:
    """Run the job in this process, and print the seconds of each phase as a line of JSON."""
    from topwork.keras_import import import_keras

    import_keras()
    from topwork.cli import main as topwork
    from topwork.training.train_step import TrainStep

    watch = Stopwatch()
    for phase, names in PHASES.items():
        for name in names:
            replace(name, lambda function, phase=phase: watch.measured(phase, function))
    started: set[int] = set()

    def phase_of_step(step: TrainStep, _batches: object) -> str:
        is_first = id(step) not in started
        started.add(id(step))
        return FIRST_STEPS if is_first else STEPS

    TrainStep.__call__ = watch.measured(phase_of_step, TrainStep.__call__)  # type: ignore[method-assign]
    watch.seconds[IMPORT] = seconds_since_process_start()
    sys.argv = ["topwork", "run", "examples/solar-transfer.yaml", "--restart"]
    sys.argv += [argument for override in overrides for argument in ("--set", override)]
    try:
        topwork()
    except SystemExit as error:
        if error.code:
            raise
    watch.seconds[OTHER] = seconds_since_process_start() - sum(watch.seconds.values())
    print(json.dumps(watch.seconds))


def replace(name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function or method by its name."""
    owner_name, attribute = name.rsplit(".", 1)
    try:
        owner = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, class_name = owner_name.rsplit(".", 1)
        owner = getattr(importlib.import_module(module), class_name)
    setattr(owner, attribute, change(getattr(owner, attribute)))


def measure(overrides: tuple[str, ...]) -> dict[str, float]:
    """Run a job in a new process and return the seconds of each phase."""
    command = [sys.executable, __file__, "--run", *overrides]
    completed = subprocess.run(command, check=False, capture_output=True, text=True)
    if completed.returncode:
        sys.exit(completed.stdout + completed.stderr)
    seconds: dict[str, float] = json.loads(completed.stdout.splitlines()[-1])
    return seconds


def format_share(seconds: float, total: float) -> str:
    """Format the duration of a phase and its share of the total."""
    return f"{seconds:.1f} ({100 * seconds / total:.0f} %)"


def main() -> None:
    """Measure both jobs and print their phases."""
    if sys.argv[1:2] == ["--run"]:
        run_measured(sys.argv[2:])
        return
    sys.path.insert(0, "examples/solar")
    from upload_base import upload_base
    from upload_images import STORAGE, upload_images

    from topwork.cli.runtime.storage import open_storage

    with open_storage(STORAGE) as storage:
        upload_base(storage)
        upload_images(storage)
    jobs = {"small": measure(SMALL), "large": measure(LARGE)}
    table = Table("phase", *(f"{name}: seconds (share)" for name in jobs))
    for phase in (IMPORT, *PHASES, FIRST_STEPS, STEPS, OTHER):
        table.add_row(phase, *(format_share(job.get(phase, 0.0), sum(job.values())) for job in jobs.values()))
    ratios = [sum(job.values()) / sum(job.get(phase, 0) for phase in COMPUTING) for job in jobs.values()]
    table.add_row("wall time / time of computing", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
