"""The dashboard *Job*: one run, from its first stage to its model."""

from dashboards_job_work import gpus, speed, storage
from dashboards_parts import (
    GREEN,
    ORANGE,
    RED,
    STATES,
    YELLOW,
    Panels,
    Query,
    bars,
    chosen,
    lines,
    mapping,
    numbers,
    seen_last,
    start,
    timeline,
    with_rows,
)
from grafana_foundation_sdk.builders import dashboard

IN = 'namespace=~"$namespace", transferjob=~"$transferjob"'
RUN = f'{IN}, run="$run"'
PODS = 'namespace=~"$namespace", pod=~"$run(-pull)?-[a-z0-9]{5}"'
JOB = 'namespace=~"$namespace", job_name="$run"'

STAGE = {"0": ("ended", GREEN), "1": ("running", "blue")}
PHASES = {"1": ("Pending", YELLOW), "2": ("Running", "blue"), "3": ("Succeeded", GREEN), "4": ("Failed", RED)}

# `or` and not `max`: what holds now goes before what was seen last, and what was seen last to wait or run has ended.
STATE = (
    f"max(topwork:run_state{{{RUN}}}) or max(last_over_time(topwork:run_state{{{RUN}}}[$__range]) > 2) "
    f"or 0 * max(last_over_time(topwork:run_state{{{RUN}}}[$__range]))"
)
ELAPSED = (
    f"sum(max by (stage) (last_over_time(topwork_stage_duration_seconds{{{RUN}}}[$__range])) or "
    f"(time() - max by (stage) (topwork_stage_start_timestamp_seconds{{{RUN}}} and on (run, stage) "
    f"topwork_stage_running{{{RUN}}} == 1)))"
)


def job_dashboard() -> dashboard.Dashboard:
    """One run in full."""
    board = start("topwork / Job", "topwork-job", "One run: its stages, loss, speed, storage, GPUs and pods.")
    board = (
        board.with_variable(chosen("namespace", "Namespace", "", several=True))
        .with_variable(chosen("transferjob", "Job", 'namespace=~"$namespace"', several=True))
        .with_variable(chosen("run", "Run", IN, several=False))
    )
    return with_rows(
        board,
        {
            "Run": [*_outcome(), *_health()],
            "Training": [*_course(), *_learning()],
            "Speed": speed(),
            "Storage": storage(),
            "GPUs": gpus(),
            "Pods": _pods(),
        },
    )


def _outcome() -> Panels:
    """What it does, how good it is, how long it took."""
    state = numbers("State", "What the run does, or how it has ended.", Query(STATE, "state"), unit="none", span=4)
    return [
        state.mappings([mapping(STATES)]),
        numbers(
            "Best metric",
            "Metric of the epoch whose weights are kept, of the last stage that has trained.",
            Query(
                f"max by (name, split) (last_over_time(topwork:run_best_metric{{{RUN}}}[$__range]))",
                "{{name}}, {{split}}",
            ),
            unit="none",
            span=4,
            decimals=4,
        ),
        numbers("Time in stages", "Wall time of all stages so far.", Query(ELAPSED, "time"), unit="s"),
    ]


def _health() -> Panels:
    """Whether something is wrong with it."""
    idle = f"max(last_over_time((time() - topwork_last_progress_timestamp_seconds{{{RUN}}})[$__range:15s]))"
    rejected = f"sum({seen_last('topwork_images_rejected_total', 'reason', RUN)})"
    firing = f'count(ALERTS{{alertname=~"Topwork.+", alertstate="firing", {RUN}}}) or vector(0)'
    return [
        numbers(
            "Since last progress",
            "Time since a step, an image, a file or a checkpoint was finished, as of the last scrape. An alert "
            "fires after 15 minutes.",
            Query(idle, "idle"),
            unit="s",
            steps=[(None, GREEN), (300, YELLOW), (900, RED)],
        ),
        numbers(
            "Images in the dataset",
            "Images that the stored dataset holds, and how many were left out.",
            Query(f"max(last_over_time(topwork_dataset_images{{{RUN}}}[$__range]))", "stored"),
            Query(rejected, "rejected"),
            unit="short",
            span=4,
        ),
        numbers(
            "Gates not met",
            "Gates of spec.evaluate.gates that the model misses; known once it is evaluated.",
            Query(f"max(last_over_time(topwork_gates_failed{{{RUN}}}[$__range]))", "gates"),
            unit="none",
            steps=[(None, GREEN), (1, RED)],
        ),
        numbers(
            "Alerts",
            "Alerts on this run that fire now.",
            Query(firing, "alerts"),
            unit="none",
            steps=[(None, GREEN), (1, ORANGE)],
        ),
    ]


def _course() -> Panels:
    """Its stages and epochs."""
    planned = seen_last("topwork_epochs_planned", "stage", RUN)
    epochs = f"{seen_last('topwork_epoch', 'stage', RUN)} / on (stage) ({planned} > 0)"
    return [
        timeline(
            "Stages",
            "When which stage ran. Later processes repeat what earlier ones did.",
            Query(f"max by (stage) (topwork_stage_running{{{RUN}}})", "{{stage}}"),
            states=STAGE,
            span=12,
        ),
        bars(
            "Time of stages",
            "Wall time of each stage that has ended.",
            Query(seen_last("topwork_stage_duration_seconds", "stage", RUN), "{{stage}}"),
            unit="s",
            span=6,
        ),
        bars(
            "Epochs",
            "Epochs that are complete, of those planned at most; early stopping may leave some out.",
            Query(epochs, "{{stage}}"),
            unit="percentunit",
            span=6,
            most=1,
        ),
    ]


def _learning() -> Panels:
    """What it has learnt."""
    return [
        lines(
            "Loss",
            "Loss of the last epoch on the training and the validation split, and of the evaluation on the test "
            "split. Validation that rises while training falls is overfitting.",
            Query(f"max by (split) (topwork_loss{{{RUN}}})", "{{split}}"),
            unit="none",
            least=None,
        ),
        lines(
            "Metrics",
            "Metrics of the last epoch, and of the evaluation on the test split.",
            Query(f"max by (name, split) (topwork_metric{{{RUN}}})", "{{name}}, {{split}}"),
            unit="none",
            least=None,
        ),
        lines(
            "Learning rate",
            "Learning rate of the last step.",
            Query(f"max(topwork_learning_rate{{{RUN}}})", "learning rate"),
            unit="sci",
            least=None,
        ),
    ]


def _pods() -> Panels:
    """Its pods, by kube-state-metrics."""
    phases = " + on (namespace, pod) ".join(
        f'{number} * max by (namespace, pod) (kube_pod_status_phase{{{PODS}, phase="{name}"}})'
        for number, (name, _) in PHASES.items()
    )
    pods = f"count(count by (namespace, pod) (last_over_time(kube_pod_status_phase{{{PODS}}}[$__range])))"
    restarts = (
        "sum(max by (namespace, pod, container) "
        f"(last_over_time(kube_pod_container_status_restarts_total{{{PODS}}}[$__range])))"
    )
    waited = (
        f"min(min_over_time(topwork_stage_start_timestamp_seconds{{{RUN}}}[$__range])) - "
        f"min(last_over_time(kube_job_status_start_time{{{JOB}}}[$__range]))"
    )
    return [
        timeline(
            "Pods",
            "Phase of each pod of the run, by kube-state-metrics. A pod is Pending while pull and transfer run in "
            "its init containers, too.",
            Query(phases, "{{pod}}"),
            states=PHASES,
            span=12,
            height=4,
        ),
        numbers(
            "Pods and restarts",
            "Pods that worked for this run: more than one where it was stopped or failed and tried again. Their "
            "containers restart only where the node does it.",
            Query(pods, "pods"),
            Query(restarts, "restarts"),
            unit="none",
            span=4,
        ),
        numbers(
            "GPUs held",
            "GPUs that the pods of the run hold, idle or not.",
            Query(f"max(last_over_time(topwork:run_gpus{{{RUN}}}[$__range]))", "GPUs"),
            unit="none",
            span=4,
        ),
        numbers(
            "Waited to start",
            "From the start of the Job to that of its first stage: a free node, the image, the volumes.",
            Query(waited, "waited"),
            unit="s",
            span=4,
            steps=[(None, GREEN), (600, YELLOW), (3600, ORANGE)],
        ),
    ]
