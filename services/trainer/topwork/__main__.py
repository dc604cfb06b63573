"""`python -m topwork` is the command `topwork`."""

from topwork.cli import main

main()
