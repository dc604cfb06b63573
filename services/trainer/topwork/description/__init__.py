"""What a job would train, computed without training it."""
