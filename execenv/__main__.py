"""`python -m execenv`."""

from execenv.cli import main

main()
