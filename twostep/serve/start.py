"""A server from its settings: what is loaded, opened and begun before it answers."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING

import uvicorn

from twostep.pipeline.request import Request
from twostep.pipeline.studio import Studio
from twostep.serve.announcement import Announcement, announced, is_switched_off, this_program
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.config import ServeError, ServeSettings, Verdict
from twostep.serve.engine import Draws, Engine, Observer
from twostep.serve.gate import LOOPBACK, Rules
from twostep.serve.logs import JobLog, set_up_logs
from twostep.serve.metrics import Metrics
from twostep.serve.picture_filter import FilteredStudio, load_filter
from twostep.serve.reloading import Reloader, Watch
from twostep.serve.serving import Serving
from twostep.serve.store import JobStore

if TYPE_CHECKING:
    from twostep.serve.cluster import Cluster

KEY_VARIABLE = "TWOSTEP_KEY"
"""Where the key is read from if there is no file of it."""

_USUAL_DEVICES = ("auto",)
"""Where commands draw."""


def run(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Serve until the process is told to end.

    Args:
        settings: what is served, and how.
        say: called with sentences for the person who started it.

    Raises ServeError where it cannot be started so, and what `Catalogue` and drawing raise.
    """
    key = _key(settings)
    if settings.host not in LOOPBACK and key is None:
        raise ServeError(
            f"{settings.host} can be reached by others, so clients need a key. "
            f"Write one to a file and give --key-file, or set {KEY_VARIABLE}."
        )
    log = JobLog(with_prompts=settings.log_prompts)
    set_up_logs(settings.log_format, settings.log_level, log, with_prompts=settings.log_prompts)
    watch = make_watch(settings)
    catalogue = Catalogue(
        watch.stock(),
        controlnets=settings.controlnets,
        bounds=settings.limits,
        engine=settings.engine,
    )
    store = None if settings.jobs is None else JobStore(settings.jobs)
    metrics = Metrics()
    observers: list[Observer] = [metrics, log]
    if store is not None:
        observers.append(store)
    studios: list[Studio] = []
    at_end: list[Callable[[], None]] = []
    if settings.cluster is not None:
        cluster = _cluster(settings)
        draws: list[Draws] = [cluster.studio] * cluster.num_calls
        # Before all others: it must know the jobs that are given to it next.
        observers.insert(0, cluster.studio)
        at_end.append(cluster.close)
    else:
        model = catalogue.default.model
        made = [
            make_studio(device, settings, watch, model, metrics.judged)
            for device in settings.devices
        ]
        studios = [studio for studio, _ in made]
        draws = [drawing for _, drawing in made]
    # Who can connect can be answered.
    listener = _listen(settings.host, settings.port)
    engine = Engine(draws, max_waiting=settings.queue, observers=observers)
    metrics.watch(engine)
    reloader = Reloader(watch, catalogue, studios, settings.reload_seconds)
    at_end.insert(0, reloader.close)
    serving = Serving(
        engine,
        catalogue,
        strict=settings.strict,
        metrics=metrics,
        store=store,
        log=log,
        reloader=reloader,
    )
    if num_resumed := serving.resume():
        say(f"{num_resumed} jobs of before are drawn now.")
    token = secrets.token_urlsafe()
    rules = Rules(key, origins=frozenset(settings.origins), max_body=int(settings.limits.body))
    try:
        app = create_app(
            serving,
            rules,
            drain_seconds=settings.drain_seconds,
            with_mcp=settings.mcp,
            log_prompts=settings.log_prompts,
            at_end=at_end,
            handover_token=token,
        )
    except ModuleNotFoundError as error:
        raise ServeError(
            f"{error.name} is not installed. Run: pip install 'twostep[serve,mcp]'."
        ) from error
    say(_greeting(settings.host, listener.getsockname()[1], needs_key=key is not None))
    config = uvicorn.Config(
        app,
        # Its own form of the log would stand beside ours. Of its two parsers, h11 bounds headers.
        log_config=None,
        access_log=False,
        http="h11",
        timeout_graceful_shutdown=int(settings.drain_seconds),
        server_header=False,
    )
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: reloader.wake())
    announcement = _announcement(settings, listener.getsockname()[1], key=key, token=token)
    with nullcontext() if announcement is None else announced(announcement):
        uvicorn.Server(config).run(sockets=[listener])


def _announcement(
    settings: ServeSettings, port: int, *, key: str | None, token: str
) -> Announcement | None:
    """Return what commands of this user are told; None for a server that is not to be told of.

    That is one which this machine's own address does not reach, or whose pictures may be others:
    it draws where a command would not, or keeps some back.
    """
    if is_switched_off() or tuple(settings.devices) != _USUAL_DEVICES:
        return None
    if settings.filter is not None or settings.cluster is not None:
        return None
    if settings.host not in (*LOOPBACK, "0.0.0.0", "::"):
        return None
    host = "[::1]" if ":" in settings.host else "127.0.0.1"
    return Announcement(f"http://{host}:{port}", key, token, this_program())


def make_watch(settings: ServeSettings) -> Watch:
    """Return what looks after the models and LoRAs that settings name; nano where they name none.

    Raises as `Watch`.
    """
    return Watch(
        ["nano"] if settings.names_no_model else settings.models,
        settings.loras,
        settings.model_folders,
        settings.lora_folders,
    )


def make_studio(
    device: str,
    settings: ServeSettings,
    watch: Watch,
    model: str,
    count: Callable[[Verdict], None] | None = None,
) -> tuple[Studio, Draws]:
    """Return a studio, and what an engine draws with: the same, behind the filter if there is one.

    The studio keeps a few models, or as many as fit into the memory that may be used. It has drawn
    with a model: whatever keeps that from drawing is raised now, and the first client need not
    wait. `count` is told of the filter's verdicts.
    """
    if settings.memory is None:
        studio = Studio(device, max_models=settings.max_models, check=watch.check)
    else:
        most = int(settings.memory)
        studio = Studio(device, max_models=sys.maxsize, max_bytes=most, check=watch.check)
    request = Request("a picture", model=model, engine=settings.engine)
    # In a thread that ends: OpenMP keeps workers for every thread that has computed, and where
    # there are more of them than cores they sleep between operations. Had this thread drawn, those
    # that draw later took twice as long on a CPU (docs/log.md).
    with ThreadPoolExecutor(1) as first:
        first.submit(studio.draw, request).result()
    if settings.filter is None:
        return studio, studio
    judge = load_filter(settings.filter, str(studio.device))
    return studio, FilteredStudio(studio, judge, count)


def _cluster(settings: ServeSettings) -> Cluster:
    """Start the replicas; raises ServeError where Ray is not installed or not to be had."""
    try:
        from twostep.serve.cluster import Cluster
    except ModuleNotFoundError as error:
        raise ServeError(
            f"{error.name} is not installed. Run: pip install 'twostep[serve,cluster]'."
        ) from error
    try:
        return Cluster(settings)
    except (ConnectionError, RuntimeError) as error:
        raise ServeError(f"the cluster cannot be started: {error}.") from error


def _key(settings: ServeSettings) -> str | None:
    """Return the key in a file or in the environment, None where there is none."""
    path = settings.key_file
    if path is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"{path} cannot be read: {error}.") from error
    if not key:
        raise ServeError(f"{path} is empty; write a long random key into it.")
    return key


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
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if needs_key else ""
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
