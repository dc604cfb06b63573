"""The job spec: what a user writes, checked before anything runs."""

# The rules register themselves with the parts that they check, so they are imported with the job.
from topwork.spec import rules
from topwork.spec.job import TransferJob

__all__ = ["TransferJob", "rules"]
