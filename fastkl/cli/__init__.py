"""The command line: `main` runs one command and returns its exit code."""

from fastkl.cli.command_line import main

__all__ = ["main"]
