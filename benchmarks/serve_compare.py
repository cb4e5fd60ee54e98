"""`twostep serve` beside diffusers behind FastAPI: the same model, the same clients, one run.

    python benchmarks/serve_compare.py [--seconds 30] [--rounds 2] [--out compare.json]

The student is exported as a folder of diffusers, and drawn from there by
`benchmarks/diffusers_server.py`. Both servers run in turns, each with the machine to itself, and
are asked for pictures of changing prompts and seeds by one client, by four and by sixteen, each of
which waits for a picture before it asks for the next. Of the rounds the medians are told. Then a
client leaves in the midst of others, and one more asks: how long it waits says whether the picture
that nobody waits for any more is drawn all the same.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from serving_load import Served, ask_openai, figures, load, serve, wish

from twostep.export.writing import export

CLIENTS = (1, 4, 16)
NUM_LEAVING = 15


def after_others_left(served: Served, steps: int, model: str) -> float:
    """Return in milliseconds how long a client waits that comes when fifteen others have left."""
    leaving = [served.connect() for _ in range(NUM_LEAVING)]
    for number, connection in enumerate(leaving):
        one = wish(number)
        body = json.dumps({"prompt": one.prompt, "seed": one.seed, "steps": steps, "model": model})
        headers = {"Content-Type": "application/json", "X-Twostep-Client": f"leaves {number}"}
        connection.request("POST", "/v1/images/generations", body, headers)
    time.sleep(0.05)
    for connection in leaving:
        connection.close()
    start = time.perf_counter()
    connection = served.connect()
    ask_openai(steps, model)(connection, "stays", wish(100))
    connection.close()
    return 1e3 * (time.perf_counter() - start)


def measure(served: Served, steps: int, model: str, seconds: float) -> dict[str, float]:
    """Return the figures of one server that runs."""
    ask = ask_openai(steps, model)
    found: dict[str, float] = {}
    for clients in CLIENTS:
        answers, used = load(served, ask, clients=clients, seconds=seconds, warm=seconds / 3)
        measured = figures(answers, seconds)
        for name in ("pictures_per_second", "p50_ms", "p95_ms"):
            found[f"{name}_{clients}"] = measured[name]
        found[f"cores_{clients}"] = used / seconds
    found["after_others_left_ms"] = statistics.median(
        after_others_left(served, steps, model) for _ in range(5)
    )
    found["megabytes"] = psutil.Process(served.process.pid).memory_info().rss / 2**20
    return found


def main(
    model: Annotated[str, typer.Option(help="A model with a student.")] = "nano",
    steps: Annotated[int, typer.Option(help="Which student.")] = 2,
    seconds: Annotated[float, typer.Option(help="How long each number of clients asks.")] = 30.0,
    rounds: Annotated[int, typer.Option(help="How often both servers run.")] = 2,
    out: Annotated[Path | None, typer.Option(help="A file for the figures, as JSON.")] = None,
) -> None:
    """Measure both, and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "student"
        export(model, "diffusers", folder, steps=steps)
        here = str(Path(__file__).with_name("diffusers_server.py"))
        commands = {
            "twostep serve": ["-m", "twostep", "serve", model, "--port", "0", "--device", "cpu"],
            "diffusers behind FastAPI": [here, str(folder)],
        }
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                with serve(command) as served:
                    taken[name].append(measure(served, steps, model, seconds))
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in taken.items()
    }
    if out is not None:
        values = {"medians": medians, "rounds": taken}
        out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    typer.echo(f"{model}, {steps} steps, {seconds:g} s for each, median of {rounds} rounds")
    typer.echo(f"| | {' | '.join(medians)} |\n|---|---:|---:|")
    for key in next(iter(medians.values())):
        typer.echo(f"| {key} | {' | '.join(f'{found[key]:.2f}' for found in medians.values())} |")


if __name__ == "__main__":
    typer.run(main)
