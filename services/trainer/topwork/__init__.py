"""Transfer learning for image classifiers as a batch service on Kubernetes."""

__version__ = "0.1.0"
