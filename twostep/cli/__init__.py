"""The command line: thin verbs over the library.

Each verb reads its flags, calls one function of a room below, and prints. torch and everything else
that takes long to import is imported inside the verbs, so that help, recipes, and what is read off
headers answer at once. Every `TwostepError` becomes one red line.
"""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from twostep import __version__
from twostep.cli import bench, cache, compare, draw, evaluate, files, pretrain, serve, train
from twostep.errors import TwostepError, reason_of
from twostep.files import UNHARMED, advice_on
from twostep.training.stopping import StoppedError

_INTERRUPTED = 130
_PIPE_CLOSED = 141
"""128 and the number of the signal, as shells count them."""


class _Verbs(TyperGroup):
    """The group of all verbs: what the caller can put right is printed in one line, without a
    traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except StoppedError as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(stopped.exit_code) from stopped
        except KeyboardInterrupt as interrupt:
            # The shell's own code for it; what was asked for needs no word.
            raise typer.Exit(_INTERRUPTED) from interrupt
        except BrokenPipeError as error:
            # Who read the paths has gone, as `head` does; nothing more can be said to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(_PIPE_CLOSED) from error
        except TwostepError as error:
            _print_error(str(error))
            raise typer.Exit(1) from error
        except OSError as error:
            # Of a place where nothing better is known: its name and the system's reason.
            _print_error(_in_words(error))
            raise typer.Exit(1) from error


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(f"error: {message}", style="red"), soft_wrap=True)


def _in_words(error: OSError) -> str:
    """Say what the system refused, and what to do about it."""
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{reason_of(error)}: {advice_on(error)}. {UNHARMED}"


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(is_wanted: bool) -> bool:
    if is_wanted:
        typer.echo(__version__)
        raise typer.Exit
    return is_wanted


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Distil a text-to-image diffusion model into one that draws in 8, 4, 2 or 1 steps, and draw
    with it.
    """


_DRAWING = (draw.generate, draw.edit, draw.replay, draw.info)
_TRAINING = (train.recipes, train.recipe, cache.cache, train.plan, train.distill, train.report)
_FILES = (
    files.export,
    files.convert,
    files.adopt,
    files.inspect,
    files.verify,
    files.extract,
    files.push,
)
_BUILT_IN = (pretrain.drawings, pretrain.pretrain, evaluate.evaluate)
_MEASURING = (compare.compare, compare.reproduce, bench.bench)
_SERVING = (serve.serve,)
for verb in (*_DRAWING, *_SERVING, *_TRAINING, *_BUILT_IN, *_MEASURING, *_FILES):
    app.command()(verb)
