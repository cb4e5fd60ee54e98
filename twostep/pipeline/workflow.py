"""The graph with which ComfyUI draws a picture that was drawn here.

Its KSampler with `euler` and `simple` is what contracts say: the trailing grid (to rounding, for
teachers), from pure noise of the same seed. An image is begun in the middle of the same grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twostep.contract import Contract, VariancePreservingSpec
from twostep.errors import TwostepError
from twostep.pipeline.request import LoraChoice, Request

_SUFFIX = ".safetensors"

_SAMPLING = {"x0": "x0", "v": "v_prediction"}
"""ComfyUI's words for what a network predicts, where it is not eps."""


def workflow_of(contract: Contract, request: Request) -> dict[str, Any] | None:
    """Return the graph of a settled request of one image, for ComfyUI's server.

    None for masks and ControlNets, for other samplers and laws of noise than SDXL's, and where an
    image is begun between two times of the grid: ComfyUI's own nodes would draw something else.
    """
    if request.mask is not None or request.controls:
        return None
    if contract.prediction_type == "flow" or contract.schedule != VariancePreservingSpec():
        return None
    if (request.sampler or contract.sampler) != "euler" or contract.sampling_times:
        return None
    graph = _Graph()
    model, clip, vae = _loaded(graph, contract, request)
    positive = graph.add("CLIPTextEncode", clip=clip, text=request.prompt)
    negative = graph.add("CLIPTextEncode", clip=clip, text=request.negative_prompt)
    if request.image is None:
        samples = _drawn(graph, request, model, positive, negative)
    else:
        begun = _begun(request)
        if begun is None:
            return None
        samples = _changed(graph, request, (model, positive, negative, vae), begun)
    pixels = graph.add("VAEDecode", samples=samples, vae=vae)
    graph.add("SaveImage", images=pixels, filename_prefix=contract.name)
    return graph.nodes


_Link = list[Any]
"""A node and the number of its output."""


class _Graph:
    """Nodes by their numbers, as they are added."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def add(self, kind: str, **inputs: Any) -> _Link:
        """Add a node; returns its first output."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]


def _loaded(graph: _Graph, contract: Contract, request: Request) -> tuple[_Link, _Link, _Link]:
    """Add the loaders; returns model, text encoders and autoencoder."""
    loras = [lora for lora in request.loras if isinstance(lora, LoraChoice)]
    checkpoint = request.model
    if contract.lora_rank is not None and not any(map(_makes_students, loras)):
        # The model itself is a LoRA on its base.
        loras = [LoraChoice(request.model), *loras]
        checkpoint = contract.base
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=_file_name(checkpoint))
    model = loader
    clip = [loader[0], 1]
    vae = [loader[0], 2]
    for lora in loras:
        model = graph.add(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=_file_name(lora.name),
            strength_model=lora.weight,
            strength_clip=lora.weight,
        )
        clip = [model[0], 1]
    if contract.prediction_type in _SAMPLING:
        sampling = _SAMPLING[contract.prediction_type]
        model = graph.add("ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=False)
    return model, clip, vae


def _makes_students(lora: LoraChoice) -> bool:
    """Whether a LoRA turns teachers into students of few steps, as far as its file can be read."""
    # These bring torch, which pictures without LoRAs are saved without.
    from twostep.formats.checkpoint import resolve
    from twostep.formats.contracts import goes_on_a_student
    from twostep.formats.lora_locate import find_lora_file

    try:
        carried = resolve(find_lora_file(lora.name)).carried
    except (TwostepError, OSError):
        return False
    return carried is not None and not goes_on_a_student(carried)


def _file_name(model: str) -> str:
    """Return what a model is called in ComfyUI's folders."""
    name = Path(model).name
    return name if name.endswith(_SUFFIX) else f"{name}{_SUFFIX}"


def _drawn(
    graph: _Graph, request: Request, model: _Link, positive: _Link, negative: _Link
) -> _Link:
    """Add what draws a picture from noise."""
    latents = graph.add(
        "EmptyLatentImage", width=request.width, height=request.height, batch_size=1
    )
    return graph.add(
        "KSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latents,
        seed=request.seed,
        steps=request.steps,
        cfg=float(request.guidance or 1),
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )


def _begun(request: Request) -> int | None:
    """Return how many steps of the grid are left out at the strength; None between two times."""
    steps = request.steps or 1
    taken = steps * (request.strength or 1)
    return steps - round(taken) if abs(taken - round(taken)) < 1e-9 else None


def _changed(
    graph: _Graph, request: Request, made: tuple[_Link, _Link, _Link, _Link], begun: int
) -> _Link:
    """Add what changes an image, whose grid begins after `begun` steps."""
    model, positive, negative, vae = made
    assert request.image is not None
    loaded = graph.add("LoadImage", image=request.image.name or "image.png")
    scaled = graph.add(
        "ImageScale",
        image=loaded,
        upscale_method="lanczos",
        width=request.width,
        height=request.height,
        crop="center",
    )
    latents = graph.add("VAEEncode", pixels=scaled, vae=vae)
    sigmas = graph.add(
        "BasicScheduler", model=model, scheduler="simple", steps=request.steps, denoise=1.0
    )
    split = graph.add("SplitSigmas", sigmas=sigmas, step=begun)
    return graph.add(
        "SamplerCustom",
        model=model,
        positive=positive,
        negative=negative,
        sampler=graph.add("KSamplerSelect", sampler_name="euler"),
        sigmas=[split[0], 1],
        latent_image=latents,
        add_noise=True,
        noise_seed=request.seed,
        cfg=float(request.guidance or 1),
    )
