"""`python -m mimiclab` is the command line, run by the interpreter of one's choice."""

from mimiclab.cli import main

main()
