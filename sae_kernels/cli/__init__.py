"""The ``sae-kernels`` command line: one typer app, one module per command."""

from sae_kernels.cli.app import app, main

__all__ = ["app", "main"]
