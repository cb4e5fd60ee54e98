"""Does another program draw the same? From the same noise and prompt, x0 is compared after each of
a model's steps.
"""

import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from twostep import diffusion
from twostep.contract import (
    Contract,
    EdmSpec,
    RectifiedFlowSpec,
    VariancePreservingSpec,
)
from twostep.diffusion import make_schedule, trailing_times
from twostep.export.pictures_only import check_is_of_pictures
from twostep.formats.checkpoint import Checkpoint, look_at_folder, resolve
from twostep.formats.diffusers_names import DIFFUSERS_NAMES, scheduler_settings
from twostep.formats.locate import ModelError, weights_variant
from twostep.formats.single_file import SingleFile, find_single_file
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import draw_noise, encode_prompts, sample_latents
from twostep.models.sdxl import (
    SDXL_CHANNELS,
    autoencoder,
    base_folder,
    diffusers_scheduler,
    text_encoders,
)
from twostep.text.vocabulary import clip_tokenizer

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
    check_is_of_pictures(checkpoint, "comparisons with other programs")
    bundle = load_bundle(checkpoint, steps=steps)
    if bundle.contract.sampler == "renoise" or bundle.contract.sampling_times:
        raise ModelError(
            f"{bundle.contract.name} adds fresh noise at every step, or visits times of its own. "
            "No two programs draw that alike, so there is nothing to compare step by step: verify "
            "a student that follows the flow along the trailing grid."
        )
    contract = bundle.contract
    if contract.role == "teacher" and steps is not None:
        contract = replace(contract, steps=steps)
        bundle = replace(bundle, contract=contract)
    width, height = contract.sizes[0]
    noise = draw_noise([seed], bundle.latent_shape(width, height))
    if comfyui is None:
        theirs = _sampled_by_diffusers(checkpoint, bundle, prompt, noise)
    else:
        theirs = _sampled_by_comfyui(comfyui, checkpoint, bundle, prompt=prompt, noise=noise)
    # EDM's programs count in the units of the latents, we in those of their deviation.
    unit = contract.schedule.sigma_data if isinstance(contract.schedule, EdmSpec) else 1.0
    differences = []
    for x0, other in zip(_sampled(bundle, prompt, noise, seed), theirs, strict=True):
        largest = (unit * x0 - other).abs().max().item()
        relative = ((unit * x0 - other).norm() / other.norm()).item()
        differences.append((largest, relative))
    return differences


def noise_levels(contract: Contract) -> list[float]:
    """Return the noise levels that a contract's steps visit, as other programs count them.

    That is sigma / alpha at the trailing times, in units of the data's deviation, falling, and 0 at
    the end. Raises ModelError for a rectified flow, which has no such levels.
    """
    if isinstance(contract.schedule, RectifiedFlowSpec):
        raise ModelError(
            f"{contract.name} follows a rectified flow, which neither diffusers' pipelines of SDXL "
            "nor ComfyUI draw: there is nothing to compare with."
        )
    schedule = make_schedule(**asdict(contract.schedule))
    levels = diffusion.noise_levels(schedule, trailing_times(contract.steps, schedule))
    unit = contract.schedule.sigma_data if isinstance(contract.schedule, EdmSpec) else 1.0
    return [*(unit * level for level in levels), 0.0]


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
    checkpoint: Checkpoint, bundle: Bundle, prompt: str, noise: Tensor
) -> list[Tensor]:
    """Return x0 at each step of diffusers, which loads the model by itself."""
    contract = bundle.contract
    levels = noise_levels(contract)
    pipeline = _diffusers_pipeline(checkpoint, contract)
    if isinstance(contract.schedule, EdmSpec):
        scheduler = EDMEulerScheduler.from_config(pipeline.scheduler.config)
        _follow(scheduler, torch.tensor(levels))
    else:
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
    unit = contract.schedule.sigma_data if isinstance(contract.schedule, EdmSpec) else 1.0
    start = noise * (unit**2 + scheduler.sigmas.max() ** 2).sqrt()
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


def vanilla_pipeline(bundle: Bundle) -> Any:
    """Return diffusers' own pipeline around the networks of a bundle, which it shares."""
    text = text_encoders(bundle)
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(bundle),
        text_encoder=text.encoders[0],
        text_encoder_2=text.encoders[1],
        tokenizer=text.tokenizers[0],
        tokenizer_2=text.tokenizers[1],
        unet=bundle.denoiser.network,
        scheduler=diffusers_scheduler(bundle.contract),
        force_zeros_for_empty_prompt=text.zeros_for_empty,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _follow(scheduler: Any, levels: Tensor) -> None:
    """Let a scheduler of EDM visit these noise levels; its own end at the least one above 0."""
    set_timesteps = scheduler.set_timesteps

    def set_levels(*arguments: Any, **options: Any) -> None:
        set_timesteps(*arguments, **options)
        scheduler.sigmas = levels
        scheduler.timesteps = scheduler.precondition_noise(levels[:-1])

    scheduler.set_timesteps = set_levels
    set_levels(len(levels) - 1)


def _diffusers_pipeline(checkpoint: Checkpoint, contract: Contract) -> Any:
    """Let diffusers load a model, or its student that has this contract."""
    path = checkpoint.path
    if checkpoint.is_whole:
        return _pipeline_of_one_file(find_single_file(checkpoint.file), contract)
    folder = checkpoint
    if not checkpoint.is_folder:
        folder = look_at_folder(base_folder(path, contract), known=(checkpoint,))
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder.path, torch_dtype=torch.float32, variant=weights_variant(folder.path / "unet")
    )
    student = checkpoint
    if checkpoint.is_folder and contract.steps in folder.students:
        student = folder.students[contract.steps]
    if contract.lora_rank is not None:
        pipeline.load_lora_weights(student.path)
        return pipeline
    if not student.is_folder and folder.contract != contract:
        pipeline.unet.load_state_dict(load_file(student.path))
    return pipeline


def _pipeline_of_one_file(single: SingleFile, contract: Contract) -> Any:
    """Let diffusers load one file by the configs that fit it, without asking the hub."""
    tokenizers: dict[str, Any] = {}
    if not (single.folder / "tokenizer").is_dir():
        tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer("!")}
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(single.header.path),
        config=str(single.folder),
        local_files_only=True,
        torch_dtype=torch.float32,
        **tokenizers,
    )
    name, settings = scheduler_settings(contract.schedule)
    settings["prediction_type"] = DIFFUSERS_NAMES[contract.prediction_type]
    scheduler: Any = {
        "EDMEulerScheduler": EDMEulerScheduler,
        "EulerDiscreteScheduler": EulerDiscreteScheduler,
    }[name]
    pipeline.scheduler = scheduler(**settings)
    return pipeline


def _sampled_by_comfyui(
    comfyui: Path, checkpoint: Checkpoint, bundle: Bundle, *, prompt: str, noise: Tensor
) -> list[Tensor]:
    """Return x0 at each step of a ComfyUI, on the CPU in float32; it wants whole files."""
    contract = bundle.contract
    levels = torch.tensor(noise_levels(contract))
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise ModelError(
            f"{comfyui} is no ComfyUI: it has no comfy/sd.py. Give the folder with its main.py."
        )
    if not checkpoint.is_whole:
        raise ModelError(
            f"{checkpoint.path} is no whole file, which ComfyUI loads: "
            f"twostep export {checkpoint.path} --to comfyui --out FILE."
        )
    _check_size_for_comfyui(bundle)
    loaders, sampling, nodes = _comfyui_modules(comfyui)
    try:
        model, clip, *_ = loaders.load_checkpoint_guess_config(
            str(checkpoint.path), output_vae=False
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"ComfyUI does not know what {checkpoint.path} is ({reason}): it recognises SDXL by "
            "its exact sizes. Verify it against diffusers."
        ) from error
    if _needs_node(contract):
        node = nodes.ModelSamplingDiscrete()
        (model,) = node.patch(model, _COMFYUI_NAMES[contract.prediction_type], False)
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, "")
    )
    if text_encoders(bundle).zeros_for_empty:
        negative = _zeroed_out(negative)
    states: list[Tensor] = []
    sampling.sample(
        model,
        noise,
        contract.steps,
        contract.guidance,
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros_like(noise),
        # Its scheduler "simple" rounds times down, which differs at most numbers of steps.
        sigmas=levels,
        callback=lambda i, x0, x, n: states.append(x0.cpu().float()),
        disable_pbar=True,
    )
    return states


def _zeroed_out(conditioning: list[list[Any]]) -> list[list[Any]]:
    """Return what ComfyUI's node ConditioningZeroOut does, whose module loads a whole server."""
    return [
        [
            torch.zeros_like(tokens),
            {**values, "pooled_output": torch.zeros_like(values["pooled_output"])},
        ]
        for tokens, values in conditioning
    ]


def _comfyui_modules(comfyui: Path) -> tuple[Any, Any, Any]:
    """Import what loads, what samples, and a node of a ComfyUI, set to the CPU and float32.

    Raises ModelError if it cannot be imported, with what to install.
    """
    sys.path.insert(0, str(comfyui))
    try:
        vars(import_module("comfy.cli_args").args).update(cpu=True, force_fp32=True)
        return (
            import_module("comfy.sd"),
            import_module("comfy.sample"),
            import_module("comfy_extras.nodes_model_advanced"),
        )
    except ImportError as error:
        sys.path.remove(str(comfyui))
        raise ModelError(
            f"the ComfyUI in {comfyui} cannot be imported here ({error}). Install what it needs "
            f"beside twostep: pip install -r {comfyui / 'requirements.txt'}."
        ) from error


def _needs_node(contract: Contract) -> bool:
    """Tell whether a ComfyUI must be told what is predicted; the other marks it reads itself."""
    is_plain = contract.schedule == VariancePreservingSpec()
    return is_plain and contract.prediction_type != "eps"


def _check_size_for_comfyui(bundle: Bundle) -> None:
    """Raise ModelError for a model that is smaller than SDXL, which ComfyUI does not know."""
    widths = bundle.denoiser.network.config.block_out_channels  # type: ignore[union-attr]
    if tuple(widths) != SDXL_CHANNELS:  # type: ignore[arg-type]
        raise ModelError(
            f"{bundle.contract.name} has the widths {list(widths)}, and ComfyUI knows SDXL by "  # type: ignore[arg-type]
            f"its exact sizes ({list(SDXL_CHANNELS)}). Verify it against diffusers."
        )
