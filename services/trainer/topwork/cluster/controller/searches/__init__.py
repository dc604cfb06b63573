"""TransferSearches: the controller is their coordinator, with one TransferJob for each trial."""
