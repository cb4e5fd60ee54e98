"""Verbs on files: export, convert, inspect."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twostep.cli.draw import contract_table


def export(
    model: Annotated[str, typer.Argument(help="A built-in name, a folder, a file, a hub id; of LoRAs a file or name.")],
    to: Annotated[str, typer.Option(help="diffusers, comfyui, unet, lora-kohya or lora-peft.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for diffusers, else the .safetensors to write.")],
    steps: Annotated[int | None, typer.Option(help="Picks the student of a model that has several.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="A LoRA to merge in, file or file:weight; or several.")] = None,
    base: Annotated[str | None, typer.Option(help="LoRAs that do not say it: a model with the same layers.")] = None,
    picture: Annotated[Path | None, typer.Option(help="For the card: what it draws.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="For the card: figures, a JSON object or a list.")] = None,
    license: Annotated[str | None, typer.Option(help="For the card: the hub's name of a licence.")] = None,
) -> None:
    """Write a model as others load it, with its contract, a card, and for ComfyUI workflows."""
    from twostep.export.card import Card
    from twostep.export.writing import export as write

    card = Card(picture, evaluation, license)
    typer.echo(f"written: {write(model, to, out, steps=steps, base=base, loras=tuple(lora or ()), card=card)}")


def inspect(
    file: Annotated[Path, typer.Argument(help="Any .safetensors, or the name of a built-in or official one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a file is, how it is to be sampled, and who can load it; its weights are not read."""
    from twostep.models.contracts import carries_contract, file_contract
    from twostep.models.folder import ModelError, find_model
    from twostep.models.kinds import read_header, summary

    path = find_model(file)
    if path.is_dir():
        raise ModelError(f"{path} is a model folder: `twostep info {path}` says what is in it. Give one file.")
    told, contract = summary(read_header(path)), file_contract(path) if carries_contract(path) else None
    if as_json:
        typer.echo(json.dumps({**told, "contract": contract and json.loads(contract.to_json())}, indent=2))
        return
    table = Table(path.name, "", show_header=True)
    for name, value in told.items():
        table.add_row(name, Text(value))
    Console().print(table, contract_table([contract]) if contract else "It carries no contract.")


def convert(
    model: Annotated[str, typer.Argument(help="A LoRA, a whole checkpoint in one file, or a diffusers folder.")],
    to: Annotated[str, typer.Option(help="LoRA: kohya, kohya-diffusers, peft, early; else diffusers or single-file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors, or the folder, to write.")],
    base: Annotated[str | None, typer.Option(help="LoRAs that do not say it: a model with the same layers.")] = None,
) -> None:
    """Write a file in another form, bit for bit: every key is accounted for, nothing is left out."""
    from twostep.export.conversion import convert as write

    typer.echo(f"written: {write(model, to, out, base=base)}")
