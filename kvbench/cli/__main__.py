"""`python -m kvbench.cli` is `kvbench`."""

from kvbench.cli import main

main()
