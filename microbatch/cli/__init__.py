"""The command line: `main`, one module for each command, and what the commands share."""

from microbatch.cli.main import main

__all__ = ["main"]
