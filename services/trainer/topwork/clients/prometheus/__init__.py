"""Prometheus metrics: exposing, pushing and reading them. The only package that imports prometheus_client."""
