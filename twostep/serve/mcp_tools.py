"""The server as tools for language models, over the Model Context Protocol at /mcp.

Needs the extra `mcp`. A model's wishes are fitted as those of the compatible APIs are, and it is
told what was changed.
"""

from __future__ import annotations

import contextlib
import json

from mcp.server.mcpserver import Audio, Context, Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from twostep import __version__
from twostep.errors import TwostepError
from twostep.media.codec import Encoded
from twostep.serve.catalogue import Wish, random_seed
from twostep.serve.following import drawing_of, events_of
from twostep.serve.items import encode
from twostep.serve.serving import Serving, controls_of
from twostep.serve.shapes import ControlBody

PATH = "/mcp"


def mcp_server(serving: Serving) -> MCPServer:
    """Return the tools of a server."""
    server = MCPServer("twostep", version=__version__)
    engine = serving.engine

    async def generate_image(
        context: Context,
        prompt: str,
        num_images: int = 1,
        seed: int | None = None,
        steps: int | None = None,
        model: str | None = None,
        negative_prompt: str = "",
        width: int | None = None,
        height: int | None = None,
        controls: list[ControlBody] | None = None,
        frames: int | None = None,
    ) -> list[Image | Audio | str]:
        """Draw pictures of a prompt; or clips or sounds, with a model that makes those.

        Fewer steps are faster, more are finer. Leave out what does not matter: the model's own is
        then taken, and a seed is picked. `describe_models` says what there is. Image i is drawn
        from seed + i. `frames` is how long a clip is. `controls` are ControlNets by name, each with
        a picture in base64 that shows where things are to be. The text after the pictures says how
        they were made and what was changed.
        """
        try:
            wish = Wish(
                prompt,
                model=model,
                num_images=num_images,
                seed=random_seed() if seed is None else seed,
                steps=steps,
                negative_prompt=negative_prompt,
                width=width,
                height=height,
                frames=frames,
                controls=await run_in_threadpool(controls_of, controls or ()),
            )
            fitted = serving.catalogue.fit(wish, strict=serving.strict)
            job = serving.submit(fitted, client="mcp")
        except TwostepError as error:
            raise ToolError(str(error)) from error
        try:
            async with contextlib.aclosing(events_of(job)) as events:
                async for event in events:
                    if event.kind == "step":
                        await context.report_progress(event.num_done, event.num_steps)
        finally:
            engine.cancel(job)  # nothing, unless the call was given up
        if job.result is None:
            raise ToolError(str(job.error))
        result = job.result
        files = [await run_in_threadpool(encode, result, i) for i in range(len(result.images))]
        made = drawing_of(result, fitted, fitted.changes) | {"seeds": result.seeds}
        return [*map(_content, files), json.dumps(made)]

    def describe_models() -> str:
        """Say which models there are, with the steps and sizes that each of them draws in."""
        return json.dumps(serving.catalogue.describe())

    server.add_tool(generate_image, structured_output=False)
    server.add_tool(describe_models, structured_output=False)
    return server


def _content(file: Encoded) -> Image | Audio:
    """Return a file as a tool's answer has it."""
    medium, _, format = file.mime.partition("/")
    if medium == "audio":
        return Audio(data=file.data, format=format)
    return Image(data=file.data, format=format)


def mcp_routes(server: MCPServer) -> list[BaseRoute]:
    """Return the addresses of the tools; the server's session manager must run meanwhile.

    Every call stands for itself, so any replica may answer it. Hosts, origins and keys are the
    gate's matter.
    """
    security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    app = server.streamable_http_app(
        streamable_http_path=PATH, stateless_http=True, transport_security=security
    )
    return list(app.routes)
