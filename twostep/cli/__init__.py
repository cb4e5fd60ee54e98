"""The command line: thin verbs over the library.

Each verb reads its flags, calls one function of a room below, and prints. torch and everything that
needs it are imported inside the verbs, so that help and recipes answer at once. Every
`TwostepError` becomes one red line.
"""

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from twostep.cli import cache, compare, draw, evaluate, files, pretrain, train
from twostep.errors import TwostepError
from twostep.training.stopping import StoppedError


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
        except TwostepError as error:
            Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Verbs,
    help=(
        "Distil a text-to-image diffusion model into one that draws in 8, 4, 2 or 1 steps, "
        "and draw with it."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
_DRAWING = (draw.generate, draw.edit, draw.replay, draw.info)
_TRAINING = (train.recipes, train.recipe, cache.cache, train.plan, train.distill, train.report)
_FILES = (files.export, files.convert, files.inspect, files.verify, files.extract, files.push)
_BUILT_IN = (pretrain.drawings, pretrain.pretrain, evaluate.evaluate)
_MEASURING = (compare.compare, compare.reproduce)
for verb in (*_DRAWING, *_TRAINING, *_BUILT_IN, *_MEASURING, *_FILES):
    app.command()(verb)
