"""Draw docs/images/monitoring-*.png: the dashboards' panels with a real Prometheus' answers during a real run.

    python benchmarks/monitoring.py        about five minutes on two cores; needs make prometheus

Runs examples/solar-base.yaml and examples/solar-transfer.yaml on two replicas, as `topwork run` does on a laptop,
scrapes them with the chart's rules, asks the queries of the panels and draws the answers. Panels that need GPUs or a
cluster are left out.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.monitoring.dashboards import panels, substitute_variables  # noqa: E402 - the tests' own, found by the line above
from tests.monitoring.prometheus_server import Prometheus, free_port  # noqa: E402

IMAGES = ROOT / "docs/images"
RUNS = (("solar-base", ["spec.transfer.epochs=10"]), ("solar-transfer", []))
LINGER_SECONDS = 15
COLUMNS = 3
NOT_HERE = ("GPU", "Pods", "Waited", "Waiting")
"""How the titles of panels begin that need GPUs or a cluster."""
STAGES = ("pull", "transfer", "fine-tune", "publish")
Answers = list[tuple[str, list[dict[str, Any]]]]
"""Legend and series of each query of a panel; times in seconds since the run began."""


def main() -> None:
    """Run, scrape, ask and draw."""
    mpl.use("Agg")
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        targets = [{"targets": [f"127.0.0.1:{port}"]}]
        prometheus = Prometheus(Path(folder) / "prometheus", [{"job_name": "topwork", "static_configs": targets}])
        try:
            start = time.time()
            runs = list(trained(Path(folder), port, prometheus))
            run, begun, ended = runs[-1]
            everything = {"namespace": ".*", "team": ".*", "transferjob": ".*", "run": ".*"}
            draw("jobs", prometheus, start, ended, everything)
            draw("job", prometheus, begun, ended, everything | {"run": run})
        finally:
            prometheus.stop()


def trained(folder: Path, port: int, prometheus: Prometheus) -> Iterator[tuple[str, float, float]]:
    """Run the examples, one after another, and say which run was scraped from when to when."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TOPWORK_"))}
    environment = kept | {"TOPWORK_STATE": str(folder / "state")}
    subprocess.run([sys.executable, ROOT / "examples/solar/upload_images.py"], env=environment, check=True)
    for name, overrides in RUNS:
        start = time.time()
        values = [*overrides, f"spec.metrics.lingerSeconds={LINGER_SECONDS}"]
        settings = [argument for value in values for argument in ("--set", value)]
        command = [sys.executable, "-m", "topwork", "run", ROOT / f"examples/{name}.yaml", "--replicas", "2"]
        running = subprocess.Popen([*command, "--metrics-port", str(port), *settings], env=environment)
        ended = f'topwork_stage_duration_seconds{{transferjob="{name}", stage="publish"}}'
        prometheus.wait_for(ended, running, seconds=600)
        time.sleep(5)
        found, end = prometheus.query(ended), time.time()
        if running.wait(timeout=120):
            sys.exit(f"topwork run ended with {running.returncode}.")
        yield found[0]["metric"]["run"], start, end


def draw(name: str, prometheus: Prometheus, start: float, end: float, values: dict[str, str]) -> None:
    """Draw the panels of a dashboard: numbers above, lines and bars below; the table of runs is for a browser."""
    values |= {"__range": f"{int(end - start)}s", "__rate_interval": "15s"}
    shown = [panel for panel in panels(f"{name}.json") if not panel["title"].startswith(NOT_HERE)]
    drawn = [(panel, asked(panel, prometheus, start, end, values)) for panel in shown]
    numbers = [each for each in drawn if each[0]["type"] == "stat"]
    charts = [each for each in drawn if each[0]["type"] in DRAWN and any(found for _, found in each[1])]
    plt.rcParams.update({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False})
    rows = -(-len(charts) // COLUMNS)
    figure = plt.figure(figsize=(12, 2.2 * rows + 0.8), layout="constrained")
    top, below = figure.subfigures(2, 1, height_ratios=[0.8, 2.2 * rows])
    for axis, (panel, answers) in zip(top.subplots(1, len(numbers)).flat, numbers, strict=True):
        draw_number(axis, panel, answers)
    axes = below.subplots(rows, COLUMNS, squeeze=False).flat
    for axis, (panel, answers) in zip(axes, charts, strict=False):
        unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"])
        title = f"{panel['title']}, {unit}" if unit else panel["title"]
        axis.set_title(title, loc="left", fontsize=8, fontweight="bold")
        DRAWN[panel["type"]](axis, answers)
    for axis in list(below.axes)[len(charts) :]:
        axis.set_axis_off()
    figure.savefig(IMAGES / f"monitoring-{name}.png", dpi=100)
    plt.close(figure)


def draw_number(axis: Axes, panel: dict[str, Any], answers: Answers) -> None:
    """The values of a panel as words, as Grafana shows them."""
    defaults = panel["fieldConfig"]["defaults"]
    words = {value: result["text"] for one in defaults.get("mappings", []) for value, result in one["options"].items()}
    told = []
    for legend, found in answers:
        for series in found:
            value = series["value"][1]
            number = f"{float(value):,.{int(defaults['decimals'])}f}"
            unit = " s" if defaults["unit"] == "s" else ""
            name = f"{called(legend, series['metric'])} " if len(answers) > 1 else ""
            told.append(name + words.get(value, number + unit))
    axis.set_axis_off()
    axis.set_title(panel["title"], loc="left", fontsize=8, fontweight="bold")
    axis.text(0, 0.5, "\n".join(told), fontsize=10 if len(told) == 1 else 8, va="center", color="C0", wrap=True)


def asked(panel: dict[str, Any], prometheus: Prometheus, start: float, end: float, values: dict[str, str]) -> Answers:
    """Ask the queries of a panel as Grafana does; each answer with its legend."""
    answers = []
    for target in panel["targets"]:
        query = substitute_variables(target["expr"], values)
        found = prometheus.query(query, end) if target.get("instant") else prometheus.query_range(query, start, end)
        for series in found:
            series["values"] = [(moment - start, value) for moment, value in series.get("values", [])]
        answers.append((target["legendFormat"], found))
    return answers


def called(legend: str, labels: dict[str, str]) -> str:
    """Fill the labels into a legend."""
    for label, value in labels.items():
        legend = legend.replace(f"{{{{{label}}}}}", value)
    return legend


def draw_lines(axis: Axes, answers: Answers) -> None:
    """Lines over the seconds since the start."""
    for legend, found in answers:
        for series in found:
            times, values = zip(*series["values"], strict=True)
            axis.plot(times, [float(value) for value in values], linewidth=1.2, label=called(legend, series["metric"]))
    axis.set_xlabel("seconds")
    axis.legend(frameon=False, fontsize=5, loc="upper left", bbox_to_anchor=(1, 1))


def draw_bars(axis: Axes, answers: Answers) -> None:
    """A bar for each series."""
    bars = {called(legend, one["metric"]): float(one["value"][1]) for legend, found in answers for one in found}
    names = sorted(bars, key=in_order, reverse=True)
    axis.barh(names, [bars[name] for name in names], height=0.6)
    axis.set_xlim(left=0, right=None if any(bars.values()) else 1)


def draw_states(axis: Axes, answers: Answers) -> None:
    """When each stage ran: a bar of a second for each time at which its series was 1."""
    times = {
        called(legend, one["metric"]): [moment for moment, value in one["values"] if value == "1"]
        for legend, found in answers
        for one in found
    }
    for name in sorted(times, key=in_order, reverse=True):
        axis.barh([name] * len(times[name]), 1, left=times[name], height=0.6, color="C0")
    axis.set_xlabel("seconds")


def in_order(name: str) -> int:
    """Place a stage where it comes in the flow."""
    return STAGES.index(name) if name in STAGES else -1


UNITS = {"s": "in seconds", "percentunit": "as a share", "Bps": "bytes a second"}
DRAWN = {"timeseries": draw_lines, "bargauge": draw_bars, "state-timeline": draw_states}


if __name__ == "__main__":
    main()
