"""`python -m forwardfill` is the command line, where no script of that name is on the PATH."""

from forwardfill.cli import app

app()
