"""Dashboards of Grafana as code: `charts/generate.py` writes them below charts/topwork/dashboards/."""

import json
from collections.abc import Iterator
from typing import Any

from dashboards_job import job_dashboard
from dashboards_jobs import jobs_dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard


def files() -> Iterator[tuple[str, str]]:
    """Give every generated file: its path below charts/topwork, and its text."""
    yield "dashboards/jobs.json", text_of(jobs_dashboard().build())
    yield "dashboards/job.json", text_of(job_dashboard().build())


def text_of(dashboard: Dashboard) -> str:
    """Write a dashboard as JSON that is the same each time: keys in order, panels numbered."""
    content = json.loads(JSONEncoder().encode(dashboard))
    for number, panel in enumerate(content["panels"], start=1):
        panel["id"] = number
    return json.dumps(without_nulls(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def without_nulls(content: Any) -> Any:
    """Leave out keys without a value, but for the lowest step of thresholds, which Grafana writes as null."""
    if isinstance(content, dict):
        return {key: without_nulls(value) for key, value in content.items() if value is not None or key == "value"}
    if isinstance(content, list):
        return [without_nulls(item) for item in content]
    return content
