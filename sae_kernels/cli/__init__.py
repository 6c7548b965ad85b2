"""The command line: one typer app, one module a command."""

from sae_kernels.cli.app import app, main

__all__ = ["app", "main"]
