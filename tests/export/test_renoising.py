"""Students that add fresh noise: exports say so, or refuse what another program cannot sample."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from twostep.contract import Contract
from twostep.diffusion import seeded_noise
from twostep.export.card import sampler_in_words, timesteps
from twostep.export.verification import verify
from twostep.export.writing import export
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sampling import draw_noise, encode_prompts, sample_prompts

from .conftest import student_contract

PROMPT = "a 3d red apple"
LCM_TIMES = (1000, 760, 500, 260)


def written(bundle: Bundle, folder: Path, sampling_times: tuple[int, ...]) -> Path:
    """A student of 4 steps that renoises, in a file beside its teacher."""
    contract = replace(
        student_contract(bundle.contract, 4), sampler="renoise", sampling_times=sampling_times
    )
    path = folder / "students" / "random_4step_renoise_unet.safetensors"
    weights = bundle.denoiser.network.state_dict()
    save_file({key: value.half() for key, value in weights.items()}, path, contract.to_metadata())
    return path


def test_its_times_and_sampler_are_put_into_words(bundle: Bundle) -> None:
    contract = replace(student_contract(bundle.contract, 4), sampler="renoise")
    assert timesteps(contract) == [999, 749, 499, 249]
    assert sampler_in_words(contract) == (
        "LCM (x0, then fresh noise) at the timesteps 999, 749, 499, 249"
    )
    other = replace(contract, sampling_times=LCM_TIMES)
    assert timesteps(other) == [999, 759, 499, 259]
    assert (
        sampler_in_words(replace(contract, sampler="euler")) == "Euler, trailing times ('simple')"
    )


@pytest.mark.slow
def test_what_cannot_be_sampled_elsewhere_is_refused(
    bundle: Bundle, folder: Path, tmp_path: Path
) -> None:
    path = written(bundle, folder, LCM_TIMES)
    try:
        with pytest.raises(ModelError, match="visits the times 1000, 760, 500, 260, which none"):
            export(path, "unet", tmp_path / "out.safetensors")
        with pytest.raises(ModelError, match="nothing to compare step by step"):
            verify(str(path), prompt=PROMPT)
        assert not list(tmp_path.iterdir())
        trailing = written(bundle, folder, ())
        export(trailing, "unet", tmp_path / "out.safetensors")
        api = json.loads((tmp_path / "out.api.json").read_text())
        sampler = next(node["inputs"] for node in api.values() if node["class_type"] == "KSampler")
        assert (sampler["sampler_name"], sampler["scheduler"]) == ("lcm", "simple")
        assert "LCM (x0, then fresh noise)" in (tmp_path / "out.md").read_text()
    finally:
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("sampling_times", [LCM_TIMES, ()], ids=["lcm", "trailing"])
def test_diffusers_draws_the_same_from_the_same_noise(
    sampling_times: tuple[int, ...],
    bundle: Bundle,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = written(bundle, folder, sampling_times)
    try:
        out = export(path, "diffusers", tmp_path / "out")
    finally:
        path.unlink()
    ours = load_bundle(out)
    assert isinstance(ours.contract, Contract) and ours.contract.sampling_times == sampling_times
    guided = encode_prompts(ours, [PROMPT], (64, 64))
    expected = sample_prompts(ours, guided, [3], (64, 64))

    noise = draw_noise([3], ours.latent_shape(64, 64))
    fresh = seeded_noise([3], noise)
    numbers = iter(range(4))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_lcm.randn_tensor",
        lambda *args, **options: fresh(next(numbers)),
    )
    pipeline = StableDiffusionXLPipeline.from_pretrained(out, torch_dtype=torch.float32)
    assert type(pipeline.scheduler).__name__ == "LCMScheduler"
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(
        PROMPT,
        width=64,
        height=64,
        output_type="latent",
        timesteps=timesteps(ours.contract),
        guidance_scale=1.0,
        latents=noise,
    ).images
    assert float((found - expected).norm() / expected.norm()) < 1e-3
