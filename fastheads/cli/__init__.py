"""The command line: what can be typed, what the commands do, and what of them is about images."""

from fastheads.cli.commands import main

__all__ = ["main"]
