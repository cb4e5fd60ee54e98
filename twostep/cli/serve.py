"""The verb that draws for other programs: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twostep.cli.units import size_in_bytes


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Built-in names, folders or .safetensors files, the default first; else nano.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A file with these settings and more, as TOML; flags win over it."),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on, 127.0.0.1 by default. Any but this machine's own needs "
            "--key-file."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 8000 by default; 0 takes a free one.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the key that clients must send; or set TWOSTEP_KEY."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA that clients may name, without .safetensors; several."),
    ] = None,
    controlnet: Annotated[
        list[str] | None,
        typer.Option("--controlnet", help="A ControlNet that clients may name; several."),
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict/--no-strict", help="Refuse what the model cannot do instead of changing it."
        ),
    ] = None,
    queue: Annotated[
        int | None, typer.Option(min=1, help="How many jobs may wait, 64 by default.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", help="Where to draw, as torch names it; several draw at once."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            parser=size_in_bytes,
            help="What loaded models may take on each device, as 24GB; else 4 of them stay.",
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(help="A file that keeps accepted jobs; what is unfinished there is drawn."),
    ] = None,
    mcp: Annotated[
        bool | None,
        typer.Option(
            "--mcp/--no-mcp", help="Give language models tools at /mcp; needs the extra mcp."
        ),
    ] = None,
) -> None:
    """Draw for other programs over HTTP, as OpenAI's images API or A1111's, and on a live page."""
    from twostep.serve.config import ServeError, read_settings

    flags = {
        "models": tuple(models) if models else None,
        "host": host,
        "port": port,
        "key_file": key_file,
        "loras": tuple(lora) if lora else None,
        "controlnets": tuple(controlnet) if controlnet else None,
        "strict": strict,
        "queue": queue,
        "devices": tuple(device) if device else None,
        "memory": memory,
        "jobs": jobs,
        "mcp": mcp,
    }
    settings = read_settings(config, flags)
    try:
        from twostep.serve.start import run
    except ModuleNotFoundError as error:
        raise ServeError(
            f"{error.name} is not installed. Run: pip install 'twostep[serve]'."
        ) from error
    run(settings, typer.echo)
