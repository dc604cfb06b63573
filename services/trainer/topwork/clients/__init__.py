"""The outside world: object storage and metrics, each behind one module."""
