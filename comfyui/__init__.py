"""ComfyUI nodes that read a checkpoint's sampling contract, so that nobody has to know how a
few-step student is drawn.

`sampling` is everything that can be said without ComfyUI, over twostep's own rooms; `nodes` puts it
into nodes of the V3 schema; `graph` checks workflows and lays them out. ComfyUI finds the nodes
through `comfy_entrypoint`.
"""


async def comfy_entrypoint() -> object:
    """Return the extension; what needs ComfyUI is imported only here."""
    from .nodes import TwostepExtension

    return TwostepExtension()
