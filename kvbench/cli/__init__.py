"""The command line: parses, calls one layer, prints. Nothing heavy is imported before a command needs it."""

from kvbench.cli.app import app, main

__all__ = ["app", "main"]
