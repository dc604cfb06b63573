"""The TransferJob spec: its models and their validation. Nothing here imports TensorFlow."""

from topwork.spec import stage_rules  # noqa: F401 - registers its rules
from topwork.spec.job import TransferJob

__all__ = ["TransferJob"]
