"""`python -m cluster` is `millrace`."""

from cluster.cli import main

main()
