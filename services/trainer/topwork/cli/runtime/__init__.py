"""The process around a command: environment, signals, logging, shutdown and exit codes."""
