"""`topwork top`: a live view of runs."""
