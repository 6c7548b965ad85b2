"""The typer app of all commands, and its exit codes.

0 is success, 1 an internal failure, 2 an error that the user can mend, 130 Ctrl-C, 143 SIGTERM.
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from sae_kernels._version import __version__
from sae_kernels.cli.accelerate import accelerate
from sae_kernels.cli.analyze import analyze
from sae_kernels.cli.bench import bench
from sae_kernels.cli.convert import convert
from sae_kernels.cli.demo import demo
from sae_kernels.cli.env import env
from sae_kernels.cli.evaluate import evaluate
from sae_kernels.cli.explain import explain
from sae_kernels.cli.harvest import harvest
from sae_kernels.cli.inspect import inspect
from sae_kernels.cli.options import Debug
from sae_kernels.cli.output import is_first
from sae_kernels.cli.plan import plan
from sae_kernels.cli.report import report
from sae_kernels.cli.resume import resume
from sae_kernels.cli.sweep import sweep
from sae_kernels.cli.train import train
from sae_kernels.cli.train_e2e import train_e2e
from sae_kernels.errors import RankError, SaeKernelsError

_COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "harvest": harvest,
    "train": train,
    "resume": resume,
    "sweep": sweep,
    "train-e2e": train_e2e,
    "eval": evaluate,
    "analyze": analyze,
    "report": report,
    "inspect": inspect,
    "convert": convert,
    "accelerate": accelerate,
    "bench": bench,
    "plan": plan,
    "env": env,
    "explain": explain,
}

# Errors about the user's input; anything else is an internal failure.
_USER_ERRORS = (SaeKernelsError, ValueError, TypeError, OSError, ImportError)

app = typer.Typer(
    name="sae-kernels",
    help="Fast sparse autoencoders: harvest activations, train on them, inspect the results.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sae-kernels {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; errors are one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return app(args=arguments, prog_name="sae-kernels", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = _verdict(error)
        # Of several processes one speaks: with other errors all have the same.
        if code == 2 and (error.said if isinstance(error, RankError) else not is_first()):
            return code
        print(f"sae-kernels: {' '.join(message.split())}", file=sys.stderr)
        return code


def _verdict(error: Exception) -> tuple[int, str]:
    if hasattr(error, "format_message"):  # of typer, whichever its base class is called
        context = getattr(error, "ctx", None)
        asked = context.command_path if context else "sae-kernels"
        return 2, f"{error.format_message().rstrip('.')}; see {asked} --help"
    if isinstance(error, OSError) and error.filename is not None:
        return 2, f"{error.filename}: {error.strerror}; check the path, its rights and the space"
    if isinstance(error, _USER_ERRORS):
        return 2, str(error)
    return 1, (
        f"internal failure, {type(error).__name__}: {error}; run it again with --debug and "
        "report what that shows"
    )
