"""Run the command line."""

import atexit
import gc
import os
import signal
import sys

import typer

from quantdm.cli import evaluate, explain, fid, look, measure, recipes, run, runs, search
from quantdm.cli.app import app
from quantdm.errors import QuantDMError

# For the worker processes, which inherit them before their torch starts: spinning threads slow a second busy process
# thirty-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

COMMANDS = (run, search, runs, explain, recipes, measure, evaluate, fid, look)  # importing registers sub-commands


# Sub-commands that keep what they have finished, or a part of it, and go on with it.
KEEPS = ("run", "demo", "search", "bank", "fit", "tune", "correct", "apply", "export", "evaluate")


class Interrupted(BaseException):
    """Ctrl-C. typer would swallow a KeyboardInterrupt without a word, and torch makes errors of its own of others."""

    asked = False


def _interrupt(*_: object) -> None:
    Interrupted.asked = True
    raise Interrupted


def main() -> None:
    """Run the command line: bad input is one line on standard error, Ctrl-C says how to go on."""
    signal.signal(signal.SIGINT, _interrupt)
    atexit.register(gc.freeze)  # a process that ends need not look for circles among all that it imported
    try:
        app()
    except (Exception, Interrupted) as error:
        if isinstance(error, QuantDMError) and not Interrupted.asked:
            typer.secho(f"error: {error}", err=True, fg="red")
            sys.exit(2)
        if not Interrupted.asked:
            raise
        keeps = len(sys.argv) > 1 and sys.argv[1] in KEEPS
        told = ": what is finished is kept; run the same command again to go on" if keeps else "; nothing was written"
        typer.echo(f"\ninterrupted{told}", err=True)
        sys.exit(130)
