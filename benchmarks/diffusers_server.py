"""A server as one writes it around diffusers: FastAPI, a pipeline that is loaded once, and a lock.

    python benchmarks/diffusers_server.py FOLDER --port 8000

It takes what `twostep serve` takes for a plain picture and answers in the same shape, so that the
same clients can ask both (`benchmarks/serve_compare.py`). A pipeline may not be used by two threads
at once; hence the lock.
"""

from __future__ import annotations

import argparse
import base64
import io
import socket
import threading
import time

import torch
import uvicorn
from diffusers import StableDiffusionXLPipeline
from fastapi import FastAPI
from pydantic import BaseModel


class Body(BaseModel):
    """What is asked for."""

    prompt: str
    seed: int = 0
    steps: int = 2
    size: int = 64


def create_app(folder: str) -> FastAPI:
    """Load a pipeline, draw once, and return the application."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    lock = threading.Lock()
    app = FastAPI()

    def draw(body: Body) -> bytes:
        with lock, torch.inference_mode():
            image = pipeline(
                body.prompt,
                num_inference_steps=body.steps,
                guidance_scale=0.0,
                width=body.size,
                height=body.size,
                generator=torch.Generator().manual_seed(body.seed),
            ).images[0]
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    # Not async: FastAPI runs it in a thread of its pool, so that the loop goes on.
    @app.post("/v1/images/generations")
    def generations(body: Body) -> dict[str, object]:
        data = base64.b64encode(draw(body)).decode()
        return {"created": int(time.time()), "data": [{"b64_json": data}]}

    draw(Body(prompt="a picture"))
    return app


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    app = create_app(arguments.folder)
    listener = socket.create_server(("127.0.0.1", arguments.port))
    print(f"serves at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
