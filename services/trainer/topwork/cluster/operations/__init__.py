"""Submit, cancel, follow, list and read logs of runs."""
