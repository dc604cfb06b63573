"""Evaluation of a trained classifier: metrics, gates, plots, report and model card."""
