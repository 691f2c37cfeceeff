"""The command line: parses arguments and prints tables."""

from azrecipe.cli.main import main

__all__ = ["main"]
