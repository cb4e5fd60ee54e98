"""The graph with which ComfyUI draws a picture that was drawn here.

Its own nodes alone are used, so that it opens in any ComfyUI. What they would draw otherwise gets
no graph: a graph that draws another picture is worse than none. docs/comfyui.md lists both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from twostep.contract import Contract, VariancePreservingSpec
from twostep.errors import TwostepError
from twostep.media.codec import FULL
from twostep.pipeline.graph_nodes import Graph, Link, output
from twostep.pipeline.graph_pictures import (
    add_latent_mask,
    add_mask,
    add_pasted,
    add_picture,
    is_readable,
    is_readable_mask,
)
from twostep.pipeline.graph_sampling import (
    MOST_SCALE,
    Drawing,
    Walk,
    add_sampling,
    control_range,
)
from twostep.pipeline.request import LoraChoice, ModelTraits, Request
from twostep.text.prompt_weights import PromptError, is_conjunction, parse_prompt

_SUFFIX = ".safetensors"

_SAMPLING = {"x0": "x0", "v": "v_prediction"}
"""ComfyUI's words for what a network predicts, where it is not eps."""


def workflow_of(
    contract: Contract, request: Request, traits: ModelTraits | None = None
) -> dict[str, Any] | None:
    """Return the graph of a settled request of one image, for ComfyUI's server.

    Arguments:
        contract: how the model is sampled.
        request: with nothing left open.
        traits: what neither says of the model; by default what SDXL's single files have.

    None for what ComfyUI's own nodes would draw otherwise.
    """
    traits = traits or ModelTraits()
    if contract.media != "image" or request.init_noise != "comfyui":
        return None
    if not _has_known_law(contract):
        return None
    if traits.is_inpainting or traits.is_long or request.embeddings or request.decoder != FULL:
        return None
    texts = _texts(request)
    walk = Walk.of(contract, request)
    if texts is None or walk is None or not _has_readable_pictures(request, walk):
        return None
    graph = Graph()
    model, clip, vae = _loaded(graph, contract, request)
    positive, negative = (_encoded(graph, clip, text, traits) for text in texts)
    controlled = _controlled(graph, request, walk, (positive, negative))
    if controlled is None:
        return None
    size = (request.width or 0, request.height or 0)
    image = mask = latents = None
    needs_image = request.image is not None and (not walk.begins_at_top or walk.has_mask)
    if needs_image and request.image is not None:
        image = add_picture(graph, request.image, size)
        latents = graph.add("VAEEncode", pixels=image, vae=vae)
    if request.mask is not None:
        mask = add_mask(graph, request.mask, size)
    drawing = Drawing(
        model=model,
        positive=controlled[0],
        negative=controlled[1],
        image=latents,
        mask=None if mask is None else add_latent_mask(graph, mask, size),
    )
    samples = add_sampling(graph, request, walk, drawing)
    if samples is None:
        return None
    pixels = graph.add("VAEDecode", samples=samples, vae=vae)
    if image is not None and mask is not None:
        pixels = add_pasted(graph, image, pixels, mask)
    graph.add("SaveImage", images=pixels, filename_prefix=contract.name)
    return graph.nodes


def _has_known_law(contract: Contract) -> bool:
    """Tell whether ComfyUI's ModelSamplingDiscrete has a model's law of noise."""
    schedule = contract.schedule
    if not isinstance(schedule, VariancePreservingSpec):
        return False
    if schedule == VariancePreservingSpec():
        return contract.prediction_type in ("eps", *_SAMPLING)
    has_zero_snr = schedule == VariancePreservingSpec(zero_snr=True)
    return has_zero_snr and contract.prediction_type in _SAMPLING


def _has_readable_pictures(request: Request, walk: Walk) -> bool:
    """Tell whether ComfyUI reads all pictures of a request as they were read here."""
    pictures = [control.picture for control in request.controls]
    if request.image is not None and not walk.begins_at_top:
        pictures.append(request.image)
    if request.mask is None:
        return all(map(is_readable, pictures))
    if request.image is not None:
        pictures.append(request.image)
    return all(map(is_readable, pictures)) and is_readable_mask(request.mask)


def _texts(request: Request) -> tuple[str, str] | None:
    """Return the two prompts as ComfyUI reads them; None where it cannot weigh one so."""
    positive = _text(request.prompt)
    # Without guidance the other is not looked at.
    negative = _text(request.negative_prompt) if (request.guidance or 1) != 1 else ""
    if positive is None or negative is None:
        return None
    return positive, negative


def _text(prompt: str) -> str | None:
    """Return a prompt as ComfyUI reads it.

    Weights above 1 are its own law. Below 1 compel's is another, `BREAK` has its pooled embedding
    from all chunks, and mixtures of prompts have no word there.
    """
    if is_conjunction(prompt) or "embedding:" in prompt:
        return None
    try:
        parts = parse_prompt(prompt)
    except PromptError:
        return None
    if len(parts) != 1 or any(fragment.weight < 1 for fragment in parts[0]):
        return None
    texts = []
    for fragment in parts[0]:
        text = re.sub(r"[()]", r"\\\g<0>", fragment.text)
        texts.append(text if fragment.weight == 1 else f"({text}:{fragment.weight:.6g})")
    return "".join(texts)


def _encoded(graph: Graph, clip: Link, text: str, traits: ModelTraits) -> Link:
    """Add what encodes a prompt; the empty one may be all zeros."""
    encoded = graph.add("CLIPTextEncode", clip=clip, text=text)
    if text == "" and traits.zeros_for_empty:
        return graph.add("ConditioningZeroOut", conditioning=encoded)
    return encoded


def _controlled(
    graph: Graph, request: Request, walk: Walk, conditionings: tuple[Link, Link]
) -> tuple[Link, Link] | None:
    """Add ControlNets to both conditionings; None where one acts as no node does."""
    positive, negative = conditionings
    size = (request.width or 0, request.height or 0)
    for control in request.controls:
        share = control_range(control, walk)
        if share is None:
            continue  # none of the steps lies in its share
        if control.scale > MOST_SCALE:
            return None
        applied = graph.add(
            "ControlNetApplyAdvanced",
            positive=positive,
            negative=negative,
            control_net=graph.add("ControlNetLoader", control_net_name=_file_name(control.model)),
            image=add_picture(graph, control.picture, size),
            strength=float(control.scale),
            start_percent=share[0],
            end_percent=share[1],
        )
        positive = applied
        negative = output(applied, 1)
    return positive, negative


def _loaded(graph: Graph, contract: Contract, request: Request) -> tuple[Link, Link, Link]:
    """Add the loaders; returns model, text encoders and autoencoder."""
    loras = [lora for lora in request.loras if isinstance(lora, LoraChoice)]
    checkpoint = request.model
    student = None
    if any(map(_makes_students, loras)):
        pass  # of the teacher, which the model is
    elif contract.lora_rank is not None:
        # The model itself is a LoRA on its base, or its student of these steps is one.
        loras = [LoraChoice(_student_file(request) or request.model), *loras]
        checkpoint = contract.base
    elif contract.role == "student":
        student = _student_file(request)
        checkpoint = checkpoint if student is None else contract.base
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=_file_name(checkpoint))
    model = loader
    clip = output(loader, 1)
    if student is not None:
        model = graph.add("UNETLoader", unet_name=_file_name(student), weight_dtype="default")
    for lora in loras:
        model = graph.add(
            "LoraLoader",
            model=model,
            clip=clip,
            lora_name=_file_name(lora.name),
            strength_model=lora.weight,
            strength_clip=lora.weight,
        )
        clip = output(model, 1)
    sampling = _SAMPLING.get(contract.prediction_type)
    if sampling is not None:
        has_zero_snr = contract.schedule == VariancePreservingSpec(zero_snr=True)
        model = graph.add(
            "ModelSamplingDiscrete", model=model, sampling=sampling, zsnr=has_zero_snr
        )
    return model, clip, output(loader, 2)


def _student_file(request: Request) -> str | None:
    """Return the file with a student's UNet or LoRA and nothing else; None if the model has all."""
    # This brings torch, which a picture that is only described does without.
    from twostep.formats.checkpoint import resolve

    try:
        checkpoint = resolve(request.model, steps=request.steps)
        if checkpoint.is_folder:
            student = checkpoint.students.get(request.steps or 0)
            return None if student is None else student.path.name
    except (TwostepError, OSError):
        return None
    return None if checkpoint.is_whole else checkpoint.path.name


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
