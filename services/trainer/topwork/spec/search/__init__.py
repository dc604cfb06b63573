"""The TransferSearch spec: its models, its space and their validation. Nothing here imports Optuna or TensorFlow."""

from topwork.spec.search.transfer_search import Parameter, Pruner, SearchMetric, SearchSpec, TransferSearch

__all__ = ["Parameter", "Pruner", "SearchMetric", "SearchSpec", "TransferSearch"]
