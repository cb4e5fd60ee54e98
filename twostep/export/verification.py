"""Does another program draw the same? From the same noise and prompt, x0 is compared after each of
a model's steps.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from twostep.contract import Contract
from twostep.formats.checkpoint import Checkpoint, look_at_folder, resolve
from twostep.formats.diffusers_names import DIFFUSERS_NAMES
from twostep.formats.locate import ModelError, weights_variant
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import draw_noise, encode_prompts, sample_latents
from twostep.models.sdxl import base_folder

_COMFYUI_NAMES = {"x0": "x0", "v": "v_prediction"}
"""What ComfyUI's node ModelSamplingDiscrete calls the prediction types other than eps."""


@torch.inference_mode()
def verify(
    model: str | Path | Checkpoint,
    *,
    prompt: str,
    seed: int = 0,
    steps: int | None = None,
    comfyui: Path | None = None,
) -> list[tuple[float, float]]:
    """Draw with another program too, from the same noise, and compare x0 at each step.

    Arguments:
        model: what is drawn with.
        prompt: what is drawn.
        seed: of the noise.
        steps: picks the student of a model that has several.
        comfyui: the folder of a ComfyUI to compare with; diffusers if not given.

    Returns for each step the largest difference, and the relative one (norms). Raises ModelError
    if the other program cannot load the model.
    """
    checkpoint = resolve(model, steps=steps)
    bundle = load_bundle(checkpoint, steps=steps)
    if bundle.contract.sampler == "renoise" or bundle.contract.sampling_times:
        raise ModelError(
            f"{bundle.contract.name} adds fresh noise at every step, or visits times of its own. "
            "No two programs draw that alike, so there is nothing to compare step by step: verify "
            "a student that follows the flow along the trailing grid."
        )
    width, height = bundle.contract.sizes[0]
    noise = draw_noise([seed], bundle.latent_shape(width, height))
    ours = _sampled(bundle, prompt, noise, seed)
    if comfyui is None:
        theirs = _sampled_by_diffusers(checkpoint, bundle.contract, prompt, noise)
    else:
        theirs = _sampled_by_comfyui(
            comfyui, checkpoint, bundle.contract, prompt=prompt, noise=noise
        )
    differences = []
    for x0, other in zip(ours, theirs, strict=True):
        largest = (x0 - other).abs().max().item()
        relative = ((x0 - other).norm() / other.norm()).item()
        differences.append((largest, relative))
    return differences


def _sampled(bundle: Bundle, prompt: str, noise: Tensor, seed: int) -> list[Tensor]:
    """Return x0 at each step of the bundle itself."""
    contract = bundle.contract
    width, height = contract.sizes[0]
    guided = encode_prompts(bundle, [prompt], (width, height))
    states: list[Tensor] = []
    sample_latents(
        bundle.denoiser,
        guided,
        noise,
        times=contract.steps,
        seeds=[seed],
        sampler=contract.sampler,
        on_step=lambda _, step: states.append(step.x0),
    )
    return states


def _sampled_by_diffusers(
    checkpoint: Checkpoint, contract: Contract, prompt: str, noise: Tensor
) -> list[Tensor]:
    """Return x0 at each step of diffusers, which loads the model by itself."""
    pipeline = _diffusers_pipeline(checkpoint, contract)
    scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config,
        timestep_spacing="trailing",
        prediction_type=DIFFUSERS_NAMES[contract.prediction_type],
    )
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    predictions: list[Tensor] = []
    step = scheduler.step

    def step_and_keep(*arguments: Any, **options: Any) -> Any:
        # The scheduler's own x0: worked out from two states it would be rounded thirty times more.
        answer = step(*arguments, **options)
        predictions.append(answer[1])
        return answer

    scheduler.step = step_and_keep
    # diffusers starts from 0.99767 of this.
    start = noise * (1 + scheduler.sigmas.max() ** 2).sqrt()
    width, height = contract.sizes[0]
    pipeline(
        prompt,
        width=width,
        height=height,
        output_type="latent",
        num_inference_steps=contract.steps,
        guidance_scale=contract.guidance,
        latents=start / scheduler.init_noise_sigma,
    )
    return predictions


def _diffusers_pipeline(checkpoint: Checkpoint, contract: Contract) -> Any:
    """Let diffusers load a model, or its student that has this contract."""
    path = checkpoint.path
    if checkpoint.is_whole:
        raise ModelError(
            f"{path} is one file, whose text encoders diffusers does not find beside transformers "
            f"5.6 or newer. Verify the folder instead: twostep convert {path} --to diffusers --out "
            "FOLDER."
        )
    folder = checkpoint
    if not checkpoint.is_folder:
        folder = look_at_folder(base_folder(path, contract), known=(checkpoint,))
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder.path, torch_dtype=torch.float32, variant=weights_variant(folder.path / "unet")
    )
    if contract.lora_rank is not None:
        pipeline.load_lora_weights(path)
        return pipeline
    student = checkpoint
    if checkpoint.is_folder and contract.steps in folder.students:
        student = folder.students[contract.steps]
    if not student.is_folder and folder.contract != contract:
        pipeline.unet.load_state_dict(load_file(student.path))
    return pipeline


def _sampled_by_comfyui(
    comfyui: Path, checkpoint: Checkpoint, contract: Contract, *, prompt: str, noise: Tensor
) -> list[Tensor]:
    """Return x0 at each step of a ComfyUI, on the CPU in float32; it wants whole files."""
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise ModelError(
            f"{comfyui} is no ComfyUI: it has no comfy/sd.py. Give the folder with its main.py."
        )
    if not checkpoint.is_whole:
        raise ModelError(
            f"{checkpoint.path} is no whole file, which ComfyUI loads: "
            f"twostep export {checkpoint.path} --to comfyui --out FILE."
        )
    sys.path.insert(0, str(comfyui))
    vars(import_module("comfy.cli_args").args).update(cpu=True, force_fp32=True)
    model, clip, *_ = import_module("comfy.sd").load_checkpoint_guess_config(
        str(checkpoint.path), output_vae=False
    )
    if contract.prediction_type != "eps":
        node = import_module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete()
        (model,) = node.patch(model, _COMFYUI_NAMES[contract.prediction_type], False)
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
    states: list[Tensor] = []
    import_module("comfy.sample").sample(
        model,
        noise,
        contract.steps,
        contract.guidance,
        "euler",
        "simple",
        *texts,
        torch.zeros_like(noise),
        callback=lambda i, x0, x, n: states.append(x0.cpu().float()),
        disable_pbar=True,
    )
    return states
