"""The controller: runs TransferJobs of a cluster as Jobs, and keeps their status up to date."""
