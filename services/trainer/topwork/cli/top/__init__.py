"""The `topwork top` command: a live view of runs."""
