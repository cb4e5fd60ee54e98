"""The verb that draws for other programs: serve."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostep.cli.units import size_in_bytes
from twostep.errors import TwostepError

if TYPE_CHECKING:
    from twostep.pipeline.studio import Studio

_KEY_VARIABLE = "TWOSTEP_KEY"
_DRAIN_SECONDS = 30.0
_MAX_MODELS = 4
"""How many models stay loaded where no memory is named; each student counts as one."""


class ServeError(TwostepError):
    """The server cannot be started as it was asked to."""


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Built-in names, folders or .safetensors files, the default first; else nano.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but this machine's own needs --key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    key_file: Annotated[
        Path | None,
        typer.Option(help=f"A file with the key that clients must send; or set {_KEY_VARIABLE}."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", help="A LoRA that clients may name, without .safetensors; several."),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", help="A ControlNet that clients may name in the same way."),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse what the model cannot do instead of changing it."),
    ] = False,
    queue: Annotated[int, typer.Option(min=1, help="How many jobs may wait.")] = 64,
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
        bool, typer.Option("--mcp", help="Give language models tools at /mcp; needs the extra mcp.")
    ] = False,
) -> None:
    """Draw for other programs over HTTP, as OpenAI's images API or A1111's, and on a live page."""
    try:
        import uvicorn

        from twostep.serve.app import create_app
    except ModuleNotFoundError as error:
        raise ServeError(
            f"{error.name} is not installed. Run: pip install 'twostep[serve]'."
        ) from error
    from twostep.pipeline.request import Request
    from twostep.serve.catalogue import Catalogue
    from twostep.serve.engine import Engine, Observer
    from twostep.serve.gate import LOOPBACK, Rules
    from twostep.serve.metrics import Metrics
    from twostep.serve.serving import Serving
    from twostep.serve.store import JobStore

    key = _key(key_file)
    if host not in LOOPBACK and key is None:
        raise ServeError(
            f"{host} can be reached by others, so clients need a key. "
            f"Write one to a file and give --key-file, or set {_KEY_VARIABLE}."
        )
    catalogue = Catalogue(models or ["nano"], lora or [], control or [])
    store = None if jobs is None else JobStore(jobs)
    studios = [_studio(name, memory) for name in device or ["auto"]]
    # Whatever keeps the default model from drawing is said now, and the first client need not wait.
    for studio in studios:
        studio.draw(Request("a picture", model=catalogue.default.model))
    listener = _listen(host, port)
    metrics = Metrics()
    observers: list[Observer] = [metrics]
    if store is not None:
        observers.append(store)
    engine = Engine(studios, max_waiting=queue, observers=observers)
    metrics.watch(engine)
    serving = Serving(engine, catalogue, strict=strict, metrics=metrics, store=store)
    if num_resumed := serving.resume():
        typer.echo(f"{num_resumed} jobs of before are drawn now.")
    try:
        app = create_app(serving, Rules(key), drain_seconds=_DRAIN_SECONDS, with_mcp=mcp)
    except ModuleNotFoundError as error:
        raise ServeError(
            f"{error.name} is not installed. Run: pip install 'twostep[serve,mcp]'."
        ) from error
    typer.echo(_greeting(host, listener.getsockname()[1], needs_key=key is not None))
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=int(_DRAIN_SECONDS),
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _studio(device: str, memory: float | None) -> Studio:
    """Return a studio that keeps a few models, or as many as fit into so many bytes."""
    from twostep.pipeline.studio import Studio

    if memory is None:
        return Studio(device, max_models=_MAX_MODELS)
    return Studio(device, max_models=sys.maxsize, max_bytes=int(memory))


def _key(path: Path | None) -> str | None:
    """Return the key in a file or in the environment, None where there is none."""
    key = os.environ.get(_KEY_VARIABLE)
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"{path} cannot be read: {error}.") from error
    if path is not None and not key:
        raise ServeError(f"{path} is empty; write a long random key into it.")
    return key or None


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ServeError(
            f"cannot listen on {host}:{port}: {error}. Give another --port, or 0 for a free one."
        ) from error


def _greeting(host: str, port: int, *, needs_key: bool) -> str:
    """Return the address, and a line for a shell that draws a picture."""
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = f' -H "Authorization: Bearer ${_KEY_VARIABLE}"' if needs_key else ""
    body = '{"prompt": "a 3d red apple on a blue background"}'
    decode = "import base64, json, sys; "
    decode += (
        "sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))"
    )
    return (
        f"twostep serves at {address}: open it in a browser to draw while you type.\n"
        f"For clients of OpenAI's API: {address}/v1; of A1111's: {address}. Ctrl-C ends it. Try:\n"
        f"curl -s {address}/v1/images/generations{key} -H 'Content-Type: application/json' "
        f"-d '{body}' | python3 -c \"{decode}\" > apple.png"
    )
