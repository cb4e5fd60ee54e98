"""Verbs on files: export."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="A built-in name, a folder, a file, a hub id; of LoRAs a file or name.")],
    to: Annotated[str, typer.Option(help="diffusers, comfyui, unet, lora-kohya or lora-peft.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for diffusers, else the .safetensors to write.")],
    steps: Annotated[int | None, typer.Option(help="Picks the student of a model that has several.")] = None,
    base: Annotated[str | None, typer.Option(help="LoRAs that do not say it: a model with the same layers.")] = None,
) -> None:
    """Write a model as others load it, with its contract, a card, and for ComfyUI a workflow."""
    from twostep.export.writing import export as write

    typer.echo(f"written: {write(model, to, out, steps=steps, base=base)}")
