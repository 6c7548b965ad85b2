"""Command ``sae-kernels accelerate``: somebody's script, with another library on these kernels."""

import os
import runpy
import sys
import traceback
from typing import Annotated

import typer

from sae_kernels import integrations
from sae_kernels.cli.options import Debug


def accelerate(
    library: Annotated[str, typer.Argument(help="sae_lens, sparsify or dictionary_learning.")],
    script: Annotated[
        list[str],
        typer.Argument(metavar="-- SCRIPT [ARGUMENT]...", help="A script and its arguments."),
    ],
    level: Annotated[
        str | None,
        typer.Option(
            metavar="module|trainer", help="How deep. [default: the deepest that the library has]"
        ),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="fused", help="Use torch's fused Adam in its trainers.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a call would run as shipped.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Run a script that stays as it is, with a library's SAEs and trainers on these kernels.

    What ran on the kernels and what did not, and why, is printed to standard error at the end.
    Processes that the script starts are not accelerated.
    """
    path, *arguments = script
    if not os.path.isfile(path):
        raise FileNotFoundError(2, "no such script", path)
    run = integrations.accelerate(library, level=level, optimizer=optimizer, strict=strict)
    before = sys.argv, list(sys.path)
    try:
        sys.argv = [path, *arguments]
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        runpy.run_path(path, run_name="__main__")
    except Exception as error:
        traceback.print_exc()  # theirs, as Python itself shows it
        raise typer.Exit(1) from error
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            raise typer.Exit(end.code or 0) from None
        print(end.code, file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        sys.argv, sys.path[:] = before
        run.undo()
        print(run.report(), file=sys.stderr)
