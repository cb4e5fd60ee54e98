"""A request made ready for a model: text encoded, pictures cut and encoded, ControlNets loaded.

An image is cut to the size that is drawn and encoded once; the drawing begins at its noised
latents. Outside of the mask it is put back after every step, noised to the time where that landed,
and at the end pixel by pixel. Networks that were made for inpainting are shown the mask and what is
not masked instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from twostep.contract import Contract
from twostep.diffusion import Schedule, trailing_times
from twostep.diffusion.grid import time_tensor
from twostep.diffusion.shapes import Batch, Latents, Time
from twostep.formats import few_step
from twostep.media.codec import FULL, Codec, HasLength
from twostep.media.image import ImageCodec
from twostep.media.pictures import covered_by_size, crop_to_size, nearest_size
from twostep.models.bundle import Bundle
from twostep.models.sampling import Guided, draw_noise, encode_prompts, sampling_times
from twostep.networks.control import Hint, load_control
from twostep.pipeline.request import (
    NUM_DISTINCT_SEEDS,
    WHITE,
    Control,
    LoraChoice,
    Picture,
    Request,
    RequestError,
)
from twostep.pipeline.timing import timed
from twostep.text.prompt_weights import is_composable
from twostep.text.words import unknown_words_warning

DEFAULT_STRENGTH = 0.75
"""How much of an image is changed where a request does not say it and has no mask."""

STAGES = ("text", "encode", "denoise", "decode")
"""The stages of a drawing, in order, by which time is counted."""

Pixels = Float[Tensor, "batch 3 height width"]
Mask = Bool[Tensor, "1 1 height width"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request made ready for a model; whatever is drawn of it depends on this and on the seeds.

    - `request`: the request with nothing left open.
    - `times`: the times that are walked, falling, the landing 0 included.
    - `guided`: what is drawn and, with guidance, what is avoided, one item each.
    - `image`, `mask`: the image in -1..1 and where it is drawn, both at the size that is drawn.
    - `x0`: the latents of the image, zeros without one.
    - `warnings`, `seconds`: as in `Result`, so far.
    """

    request: Request
    times: tuple[Time, ...]
    guided: Guided
    image: Float[Tensor, "1 3 height width"] | None
    mask: Mask | None
    x0: Float[Tensor, "1 *latents"]
    warnings: list[str]
    seconds: dict[str, float]

    @property
    def batch_key(self) -> object:
        """What two requests must have in common to be drawn in one batch.

        These are times, sampler, guidance, size, tokens, ControlNets with their scales and shares,
        and whether anything is put back. What an inpainting network is shown is one picture for the
        whole batch, so those are drawn by themselves; and so is what another engine runs, for only
        the operations of an eager network can be computed part by part.
        """
        controls = [replace(each, picture=Picture("", "")) for each in self.request.controls]
        known = self.guided.positive.known
        return (
            self.times,
            self.guided.scale,
            self.x0.shape,
            self.guided.positive.text.shape,
            tuple(controls),
            self.request.init_noise,
            self.request.sampler,
            self.mask is None,
            None if known is None and self.request.engine == "eager" else id(self),
        )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of what is drawn."""
        return self.request.width or 0, self.request.height or 0

    def noise(self, seeds: list[int]) -> Batch:
        """Return the noise of each seed."""
        return draw_noise(seeds, self.x0.shape[1:], self.x0.device)

    def beginning(self, noise: Batch, schedule: Schedule) -> Batch:
        """Return x at the first time: the noise, or the noised image."""
        is_comfyuis = self.request.init_noise == "comfyui"
        if self.request.image is None and (is_comfyuis or self.times[0] != schedule.top):
            return noise  # of which nothing else is left at the top
        t = time_tensor(self.times[:1]).expand(len(noise))
        x0 = self.x0.expand_as(noise)
        if is_comfyuis:
            return schedule.add_noise(x0, noise, t)
        alpha, sigma = schedule.coefficients(t, noise)
        if self.mask is not None and self.times[0] == schedule.top:
            return sigma * noise  # as diffusers inpaints
        return sigma * noise + alpha * x0

    def put_back(self, x: Batch, s: Tensor, noise: Batch, schedule: Schedule) -> Batch:
        """Return x at times s with the image, noised to s, outside of the mask.

        Inpainting networks see themselves what they have to keep.
        """
        if self.mask is None or self.guided.positive.known is not None:
            return x
        image = schedule.add_noise(self.x0.expand_as(noise), noise, s)
        return torch.where(_coarse(self.mask, noise), x, image)

    def finished(self, media: Batch) -> Batch:
        """Put the image's own pixels back outside of the mask."""
        if self.mask is None or self.image is None:
            return media
        return torch.where(self.mask, media, self.image)


def prepare(bundle: Bundle, request: Request) -> Prepared:
    """Make a request ready for a model.

    Raises ContractError for what the contract of the model cannot honour, RequestError for a mask
    that leaves nothing to draw, PromptError for weights in a prompt that cannot be read, and
    ModelError for a ControlNet that does not fit.
    """
    warnings = bundle.contract.check(
        request.steps,
        request.guidance,
        request.width,
        request.height,
        sampler=request.sampler,
    )
    wished_strength = request.strength
    warnings += _unread_loras(bundle, request)
    codec = _codec_of_length(bundle, request.frames)
    _check_medium(bundle, request)
    request, times = _settled(bundle, request, codec)
    seconds = dict.fromkeys(STAGES, 0.0)
    with timed(seconds, "text"):
        warnings = [*warnings, *_warnings(bundle, request, times, wished_strength)]
        guided = encode_prompts(
            bundle,
            [request.prompt],
            (request.width or 0, request.height or 0),
            negative_prompt=request.negative_prompt,
            scale=request.guidance,
            whole=True,
        )
    with timed(seconds, "encode"):
        size = (int(request.width or 0), int(request.height or 0))
        image = None if request.image is None else _pixels(bundle, request.image, size)
        mask = None if request.mask is None else _mask(bundle, request.mask, size)
        if image is None:
            x0 = torch.zeros(
                1,
                *codec.latent_shape(*size),
                dtype=torch.float32,
                device=bundle.denoiser.device,
            )
        else:
            x0 = bundle.codec.encode(image)
        known = _known(bundle, size, image, mask) if bundle.is_inpainting else None
        hints = tuple(_hint(bundle, control, size, times) for control in request.controls)
    guided = guided.shown(known, hints)
    return Prepared(
        request=request,
        times=times,
        guided=guided,
        image=image,
        mask=mask,
        x0=x0,
        warnings=warnings,
        seconds=seconds,
    )


def _unread_loras(bundle: Bundle, request: Request) -> list[str]:
    """Warn of LoRAs that a request names and the model does not carry."""
    wished = [str(lora) for lora in request.loras]
    carried = [str(LoraChoice.parse(lora)) for lora in bundle.origin[1:]]
    missing = [lora for lora in wished if lora not in carried]
    if not missing:
        return []
    return [
        f"{', '.join(missing)} is not on this model, and has no effect: a Studio loads what a "
        "request names, and load_with_loras(model, [file]) puts a LoRA on."
    ]


def _codec_of_length(bundle: Bundle, frames: int | None) -> Codec:
    """Return the codec of a model for clips of so many frames, its own number if None.

    Raises RequestError for frames of what is no clip, CodecError for more than there can be.
    """
    if frames is None:
        return bundle.codec
    if not isinstance(bundle.codec, HasLength):
        raise RequestError(
            f"{bundle.contract.name} draws items of the medium {bundle.codec.media!r}, which have "
            "no frames. Leave frames out, or take a model of clips."
        )
    return bundle.codec.with_length(frames)


def _check_medium(bundle: Bundle, request: Request) -> None:
    """Refuse pictures that go into what draws none: RequestError."""
    if bundle.codec.media == "image" or (request.image is None and not request.controls):
        return
    raise RequestError(
        f"{bundle.contract.name} draws items of the medium {bundle.codec.media!r}, into which no "
        "picture goes. Leave image and controls out, or take a model of pictures."
    )


def _settled(bundle: Bundle, request: Request, codec: Codec) -> tuple[Request, tuple[Time, ...]]:
    """Return a checked request with nothing left open, and the times that it walks.

    A student's guidance is distilled into it, so it gets none, which is 1. Engine and decoder are
    those of the bundle, and so are the model and the LoRAs, if it says which.
    """
    contract = bundle.contract
    if contract.role == "student":
        guidance = 1.0
    else:
        wished = contract.guidance if request.guidance is None else request.guidance
        guidance = max(1.0, wished)
    steps = request.steps or contract.steps
    schedule = bundle.denoiser.schedule
    start: Time | None = None
    strength = None
    if request.image is not None:
        start = _first_time(contract, request, steps, schedule)
        strength = start / schedule.top
    width, height = _size(contract, request)
    model, loras = request.model, request.loras
    if bundle.origin:
        model, *names = bundle.origin
        loras = tuple(map(LoraChoice.parse, names))
    settled = replace(
        request,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        strength=strength,
        sampler=request.sampler or contract.sampler,
        engine=bundle.runtime.engine,
        decoder=bundle.codec.decoder if isinstance(bundle.codec, ImageCodec) else FULL,
        model=model,
        loras=loras,
        frames=codec.length if isinstance(codec, HasLength) else None,
    )
    return settled, sampling_times(contract, schedule, steps=steps, start=start)


def _first_time(contract: Contract, request: Request, steps: int, schedule: Schedule) -> Time:
    """Return the time at which an image is begun.

    It is that trained time, or of a teacher's grid, which is nearest to the strength. Raises
    RequestError for a student that knows no image in its noise.
    """
    if contract.sampling_times and contract.sampling_times[0] != schedule.top:
        raise RequestError(
            f"{contract.name} draws from pure noise alone, which it takes for latents of time "
            f"{contract.sampling_times[0]:g}, so it cannot begin with an image. Use another "
            "student for that."
        )
    usual = DEFAULT_STRENGTH if request.mask is None else 1.0
    wished = schedule.top * (request.strength or usual)
    times = contract.trained_times or trailing_times(steps, schedule)
    return min(times, key=lambda t: (abs(t - wished), -t))


def _size(contract: Contract, request: Request) -> tuple[int, int]:
    """Return (width, height) in pixels: what a request leaves open fits its pictures best."""
    fitting = [
        (width, height)
        for width, height in contract.sizes
        if request.width in (None, width) and request.height in (None, height)
    ]
    if not fitting:  # a size between those of the contract, which allows it
        fitting = [(request.width or 0, request.height or 0)]
    pictures = [control.picture for control in request.controls]
    if request.image is not None:
        pictures.insert(0, request.image)
    if not pictures:
        return fitting[0]
    return nearest_size(pictures[0].image, fitting)


def _pixels(
    bundle: Bundle, picture: Picture, size: tuple[int, int]
) -> Float[Tensor, "1 3 height width"]:
    """Cut a picture to a size (width, height); in -1..1, where the network is."""
    return crop_to_size(picture.image, [size])[0][None].to(bundle.denoiser.device)


def _mask(bundle: Bundle, picture: Picture, size: tuple[int, int]) -> Mask:
    """Return where a mask is to be drawn, at a size (width, height).

    However thin a part of it is, a pixel that it touches counts. RequestError where that is
    nowhere.
    """
    wanted = _wanted(picture)
    if not wanted.any():
        raise RequestError("the mask is black everywhere; paint what is to be drawn anew white.")
    mask = covered_by_size(wanted, size).to(bundle.denoiser.device)[None, None]
    if not bool(mask.any()):
        raise RequestError(
            "all that is white in the mask lies outside of what is drawn: the picture is cut to "
            f"{size[0]}x{size[1]} pixels. Give a size of the picture's own shape."
        )
    return mask


def _wanted(picture: Picture) -> np.ndarray:
    """Return where a mask, at its own size, asks for something new, as booleans.

    That is what is white or transparent. If all that is opaque in it is white, it was painted on an
    empty layer: then what is transparent stays.
    """
    is_white = np.asarray(picture.image.convert("L")) >= WHITE
    if picture.alpha is None or not picture.is_white_on_nothing:
        return is_white
    return np.asarray(picture.alpha) >= WHITE


def _hint(bundle: Bundle, control: Control, size: tuple[int, int], times: tuple[Time, ...]) -> Hint:
    """Load a ControlNet and say at which times it acts.

    A step counts if it lies wholly in the control's share of them.
    """
    if not isinstance(bundle.codec, ImageCodec):
        raise RequestError(
            f"{bundle.contract.name} makes {bundle.codec.media}, and a ControlNet looks at a "
            "picture of the same size. Leave the controls out."
        )
    count = len(times) - 1
    acting = [
        times[i]
        for i in range(count)
        if control.start <= i / count and (i + 1) / count <= control.end
    ]
    pixels_per_latent = size[0] // bundle.latent_shape(*size)[-1]
    network = load_control(control.model, bundle.denoiser.network, pixels_per_latent)
    picture = (_pixels(bundle, control.picture, size) + 1) / 2
    network = bundle.runtime.convert(network)
    return Hint(network, picture, control.scale, frozenset(acting))


def _known(
    bundle: Bundle, size: tuple[int, int], image: Pixels | None, mask: Mask | None
) -> Float[Tensor, "1 known h w"]:
    """Return what an inpainting UNet takes: the mask, and the latents of the image.

    The image is grey where it is to be drawn.
    """
    if image is None or mask is None:
        width, height = size
        image = torch.zeros(1, 3, height, width, dtype=torch.float32, device=bundle.denoiser.device)
        mask = torch.ones_like(image[:, :1], dtype=torch.bool)
    latents = bundle.codec.encode(image.masked_fill(mask, 0))
    return torch.cat([_coarse(mask, latents).to(latents.dtype), latents], dim=1)


def _coarse(mask: Mask, like: Latents) -> Bool[Tensor, "1 1 h w"]:
    """Return a mask at the size of latents: a latent counts if any of its pixels does."""
    return adaptive_max_pool2d(mask.float(), like.shape[2:]) > 0


def _warnings(
    bundle: Bundle, request: Request, times: tuple[Time, ...], wished_strength: float | None
) -> list[str]:
    """Say what of a settled request will not have the effect that one expects."""
    warnings = []
    contract = bundle.contract
    if not request.prompt.strip():
        warnings.append("the prompt is empty: the model may draw anything it knows.")
    texts = [request.prompt, request.negative_prompt]
    if request.negative_prompt and request.guidance == 1:
        texts.pop()
        warnings.append(
            "the negative prompt has no effect: it acts through guidance, and there is none here."
        )
    unknown = [word for text in texts for word in bundle.unknown_words(text)]
    if unknown:
        warnings.append(unknown_words_warning(contract.name, unknown))
    if any(is_composable(text) for text in texts):
        warnings.append(
            "AND is read as the word: prompts are not guided each by itself, as A1111 does. "
            '("one", "other").blend(1, 1) mixes two prompts, BREAK encodes them apart.'
        )
    few_steps = few_step.note(contract)
    if few_steps is not None:
        warnings.append(few_steps)
    warnings += _picture_warnings(request)
    last = request.seeds[-1]
    if last >= NUM_DISTINCT_SEEDS:
        warnings.append(
            f"seed {last} draws the same noise as seed {last % NUM_DISTINCT_SEEDS}: "
            "torch's generator tells only 2**32 seeds apart."
        )
    top = bundle.denoiser.schedule.top
    taken = times[0] / top
    if wished_strength not in (None, taken) and contract.role == "student":
        stops = ", ".join(f"{t / top:g}" for t in sorted(contract.trained_times))
        warnings.append(
            f"strength {wished_strength:g} became {taken:g}, which takes {len(times) - 1} "
            f"step(s): {contract.name} was trained to begin at {stops}, and nowhere between."
        )
    return warnings


def _picture_warnings(request: Request) -> list[str]:
    """Say what of the pictures that go in may not be what one expects."""
    warnings = []
    pictures = {"image": request.image, "mask": request.mask}
    pictures |= {f"control {i}": each.picture for i, each in enumerate(request.controls, 1)}
    for what, picture in pictures.items():
        if picture is not None:
            name = picture.name or f"the {what}"
            warnings += [f"{name}: {note}" for note in picture.notes]
    if request.mask is not None and request.mask.is_white_on_nothing:
        warnings.append(
            "the mask is white on a transparent layer: what is white is drawn anew, and what is "
            "transparent stays. Put black behind it to say so yourself."
        )
    return warnings
