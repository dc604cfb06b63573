"""`python -m topwork` runs the `topwork` command."""

from topwork.cli import main

main()
