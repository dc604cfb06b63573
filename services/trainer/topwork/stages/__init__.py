"""The four stages of a run, in order: pull, transfer, fine-tune, publish. Each is idempotent and resumable."""
