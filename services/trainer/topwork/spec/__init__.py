"""The job spec: what a user writes, checked before anything runs."""

from topwork.spec.job import TransferJob

__all__ = ["TransferJob"]
