"""Verbs that show the recipes of the package: every named run, as a TOML file to read, copy and change."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def recipes() -> None:
    """List the recipes that come with the package."""
    from twostep.runs.recipe import find_recipe, recipe_names

    table = Table(box=None, pad_edge=False, show_header=False)
    for name in recipe_names():
        first_line = find_recipe(name).read_text(encoding="utf-8").split("\n", 1)[0]
        table.add_row(Text(name, style="bold"), Text(first_line.lstrip("# ")))
    Console().print(table)


def recipe(name: Annotated[str, typer.Argument(help="A name that `twostep recipes` lists.")]) -> None:
    """Print a recipe: twostep recipe NAME > mine.toml copies it out."""
    from twostep.runs.recipe import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
