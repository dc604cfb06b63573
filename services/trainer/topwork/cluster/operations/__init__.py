"""Operations on runs: submit, cancel, follow, list, and read logs."""
