"""The process of a command: environment variables, logging, signals, storage, shutdown and exit codes."""
