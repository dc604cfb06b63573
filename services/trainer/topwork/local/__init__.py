"""The embedded S3 server of `topwork run`."""
