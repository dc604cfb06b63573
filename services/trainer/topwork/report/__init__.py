"""What is known of a trained classifier: evaluation, plots, report, model card."""
