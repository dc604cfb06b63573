"""Writing a job spec as YAML, in full."""

import io

from ruamel.yaml import YAML

from topwork.spec.job import TransferJob


def yaml_text(job: TransferJob) -> str:
    """Write a job spec in full: every key, defaults as well, in the order of the reference.

    Args:
        job: The job.

    Returns:
        YAML that reads back as the same job.
    """
    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(job.model_dump(mode="json", by_alias=True, exclude_none=True), text)
    return text.getvalue()
