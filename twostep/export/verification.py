"""Does another program draw the same? From the same noise and prompt, x0 is compared after each of
a model's steps.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from twostep.contract import Contract
from twostep.diffusion import initial_noise, sample
from twostep.formats.locate import ModelError, find_model, weights_variant
from twostep.formats.single_file import is_whole
from twostep.models.bundle import base_folder, load_bundle
from twostep.models.contracts import DIFFUSERS_NAMES, read_contracts, student_files


@torch.inference_mode()
def verify(
    model: str, *, prompt: str, seed: int = 0, steps: int | None = None, comfyui: Path | None = None
) -> list[tuple[float, float]]:
    """Return for each step the largest difference to diffusers, or to the ComfyUI there, and the
    relative one.
    """
    path, bundle = find_model(model, steps=steps), load_bundle(model, steps=steps)
    contract, (width, height) = bundle.contract, bundle.contract.sizes[0]
    noise = initial_noise(seed, bundle.latent_shape(width, height))[None]
    told, ours = bundle.conditioning([prompt, ""], width, height), list[Tensor]()
    denoise = bundle.denoiser.with_guidance(told[:1], told[1:], contract.guidance)
    sample(
        denoise,
        noise,
        contract.steps,
        bundle.denoiser.schedule,
        lambda _, step: ours.append(step.x0),
    )
    theirs = (
        _comfyui(comfyui, path, contract, prompt, noise)
        if comfyui
        else _diffusers(path, contract, prompt, noise)
    )
    pairs = zip(ours, theirs, strict=True)
    return [((a - b).abs().max().item(), ((a - b).norm() / b.norm()).item()) for a, b in pairs]


def _diffusers(path: Path, contract: Contract, prompt: str, noise: Tensor) -> list[Tensor]:
    """Let diffusers load the model by itself, and draw with the steps and the guidance of the
    contract.
    """
    if path.is_file() and is_whole(path):
        problem = "is one file, whose text encoders diffusers does not find beside transformers 5.6 or newer"
        advice = f"Verify the folder instead: twostep convert {path} --to diffusers --out FOLDER"
        raise ModelError(f"{path} {problem}. {advice}.")
    folder = path if path.is_dir() else base_folder(path, contract)
    variant = weights_variant(folder / "unet")
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, variant=variant
    )
    student = path if path.is_file() else student_files(folder).get(contract.steps)
    if contract.lora_rank is not None:
        pipeline.load_lora_weights(path)
    elif student is not None and read_contracts(folder)[0] != contract:
        pipeline.unet.load_state_dict(load_file(student))
    settings = {
        "timestep_spacing": "trailing",
        "prediction_type": DIFFUSERS_NAMES[contract.prediction_type],
    }
    scheduler = pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, **settings
    )
    pipeline.set_progress_bar_config(disable=True)

    def keep(*told: Any) -> dict[str, Tensor]:
        states.append(told[-1]["latents"])
        return {}

    # diffusers starts from 0.99767 of this
    states = [noise * (1 + scheduler.sigmas.max() ** 2).sqrt()]
    (width, height), start = contract.sizes[0], states[0] / scheduler.init_noise_sigma
    asked = {
        "num_inference_steps": contract.steps,
        "guidance_scale": contract.guidance,
        "latents": start,
    }
    pipeline(
        prompt, width=width, height=height, output_type="latent", callback_on_step_end=keep, **asked
    )
    # An Euler step goes along the line through x and x0: with the states before and after it, x0 is
    # known.
    steps = zip(pairwise(states), pairwise(scheduler.sigmas), strict=True)
    return [x + t * (x - after) / (s - t) for (x, after), (t, s) in steps]


def _comfyui(
    folder: Path, path: Path, contract: Contract, prompt: str, noise: Tensor
) -> list[Tensor]:
    """Let a ComfyUI draw, on the CPU in float32; it wants whole files."""
    if not (folder / "comfy" / "sd.py").is_file():
        raise ModelError(
            f"{folder} is no ComfyUI: it has no comfy/sd.py. Give the folder with its main.py."
        )
    if path.is_dir() or not is_whole(path):
        advice = f"twostep export {path} --to comfyui --out FILE"
        raise ModelError(f"{path} is no whole file, which ComfyUI loads: {advice}.")
    sys.path.insert(0, str(folder))
    vars(import_module("comfy.cli_args").args).update(cpu=True, force_fp32=True)
    model, clip, *_ = import_module("comfy.sd").load_checkpoint_guess_config(
        str(path), output_vae=False
    )
    if contract.prediction_type != "eps":
        named, node = (
            {"x0": "x0", "v": "v_prediction"},
            import_module("comfy_extras.nodes_model_advanced"),
        )
        (model,) = node.ModelSamplingDiscrete().patch(model, named[contract.prediction_type], False)
    texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")]
    found: list[Tensor] = []
    more: dict[str, Any] = {
        "callback": lambda i, x0, x, n: found.append(x0.cpu().float()),
        "disable_pbar": True,
    }
    settings = (
        contract.steps,
        contract.guidance,
        "euler",
        "simple",
        *texts,
        torch.zeros_like(noise),
    )
    import_module("comfy.sample").sample(model, noise, *settings, **more)
    return found
