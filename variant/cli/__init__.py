"""The command line ``variant``."""

from variant.cli.main import main

__all__ = ["main"]
