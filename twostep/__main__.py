"""What `python -m twostep` runs, for launchers that start modules."""

from twostep.cli import app

app()
