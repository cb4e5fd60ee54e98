"""The family of Stable Audio: what is read, compared with diffusers, and what is refused."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableAudioPipeline
from torch import Tensor
from transformers import AutoTokenizer

from tests.stable_audio import (
    HOP,
    LONGEST,
    RATE,
    CosineDPMSolverMultistepScheduler,
    save_tiny_pipeline,
)
from twostep import Request, Studio
from twostep.contract import EdmSpec
from twostep.formats import stable_audio as formats
from twostep.formats.locate import ModelError
from twostep.formats.stable_audio import is_stable_audio
from twostep.media.audio import AudioError
from twostep.media.codec import Codec
from twostep.media.oobleck import OobleckCodec
from twostep.models.bundle import Bundle, PromptEncoder
from twostep.models.families import Family, find_family
from twostep.models.loading import load_bundle
from twostep.models.sampling import encode_prompts, sample_latents
from twostep.models.saving import save_bundle
from twostep.networks.backbone import Backbone

SAMPLES = HOP * LONGEST
PROMPT = "rain on a roof"

# Sines and angles in float32, once by diffusers and once by way of log(level) / 4: both rounded.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class WithoutNoise(CosineDPMSolverMultistepScheduler):
    """diffusers' scheduler with first-order steps of the ordinary differential equation.

    Its times, its scaling and its conversion to x0 are as they were; its own steps are random.
    """

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        level, lower = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        x0 = self.convert_model_output(model_output, sample)
        self._step_index += 1
        moved = x0 + lower / level * (sample - x0)
        return type("Moved", (), {"prev_sample": moved})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[StableAudioPipeline, Path]:
    folder = tmp_path_factory.mktemp("models") / "rain"
    return save_tiny_pipeline(folder), folder


@pytest.fixture
def folder(saved: tuple[StableAudioPipeline, Path], tmp_path: Path) -> Path:
    """Return a copy that a test may change."""
    return Path(shutil.copytree(saved[1], tmp_path / "rain"))


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_of_diffusers_has_a_contract_and_fits_the_seams(
    saved: tuple[StableAudioPipeline, Path],
) -> None:
    bundle = load_bundle(saved[1])
    contract = bundle.contract
    assert contract.family == "stable-audio" and contract.media == "audio"
    assert contract.schedule == EdmSpec(0.3, 500.0, 1.0, "exponential")
    assert contract.prediction_type == "v" and contract.sizes == ((SAMPLES, 1),)
    assert isinstance(find_family("stable-audio"), Family)
    assert isinstance(bundle.denoiser.backbone, Backbone)
    assert isinstance(bundle.codec, Codec) and isinstance(bundle.text, PromptEncoder)
    assert load_bundle(saved[1], outline=True).contract == contract


def test_what_configs_leave_out_is_what_diffusers_takes() -> None:
    classes = {
        "_SCHEDULER_DEFAULTS": CosineDPMSolverMultistepScheduler,
        "_TRANSFORMER_DEFAULTS": diffusers.StableAudioDiTModel,
        "_VAE_DEFAULTS": diffusers.AutoencoderOobleck,
    }
    for name, kind in classes.items():
        parameters = inspect.signature(kind.__init__).parameters
        for key, value in getattr(formats, name).items():
            default = parameters[key].default
            assert (tuple(default) if isinstance(default, list) else default) == value, key


@pytest.mark.parametrize("negative", [None, "low quality"])
@pytest.mark.parametrize("samples", [SAMPLES, 5 * HOP])
def test_latents_are_those_of_diffusers_pipeline(
    saved: tuple[StableAudioPipeline, Path], negative: str | None, samples: int
) -> None:
    """Prompts, seconds, guidance, times, x0 and every step, from the same noise."""
    pipeline, folder = saved
    bundle = load_bundle(folder)
    steps = 5
    noise = torch.randn(1, 4, LONGEST, generator=torch.Generator().manual_seed(1))
    walked = StableAudioPipeline(**{**pipeline.components, "scheduler": WithoutNoise()})
    walked.set_progress_bar_config(disable=True)
    theirs = walked(
        PROMPT,
        negative_prompt=negative,
        audio_end_in_s=samples / RATE,
        num_inference_steps=steps,
        guidance_scale=3.0,
        latents=noise,
        output_type="latent",
    ).audios
    guided = encode_prompts(
        bundle, [PROMPT], (samples, 1), negative_prompt=negative or "", scale=3.0
    )
    # Its levels fall evenly in their logarithm, as times do here, from the top to the least.
    lowest = 1e-6
    times = [*torch.linspace(1, lowest, steps, dtype=torch.float64).tolist(), 0]
    with torch.no_grad():
        ours = sample_latents(bundle.denoiser, guided, noise, times, [0])
    assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-3)
    assert float(ours.std()) > 0.05


def test_one_call_of_the_network_and_its_x0_are_those_of_diffusers(
    saved: tuple[StableAudioPipeline, Path],
) -> None:
    pipeline, folder = saved
    bundle = load_bundle(folder)
    scheduler = WithoutNoise()
    scheduler.set_timesteps(8)
    noise = torch.randn(1, 4, LONGEST, generator=torch.Generator().manual_seed(2))
    conditioning = bundle.conditioning([PROMPT], SAMPLES, 1)
    turns = diffusers.models.embeddings.get_1d_rotary_pos_embed(
        8, LONGEST + 1, use_real=True, repeat_interleave_real=False
    )
    for position in (0, 3, 6):
        level = float(scheduler.sigmas[position])
        scheduler._step_index = position
        latents = level * noise
        with torch.no_grad():
            output = pipeline.transformer(
                scheduler.scale_model_input(latents, None),
                scheduler.timesteps[position : position + 1],
                encoder_hidden_states=conditioning.text,
                global_hidden_states=conditioning.pooled[:, None],
                rotary_embedding=turns,
            ).sample
            expected = scheduler.convert_model_output(output, latents)
            t = torch.tensor([1 - position / 7], dtype=torch.float64)
            alpha, _ = bundle.denoiser.schedule.coefficients(t, latents)
            prediction = bundle.denoiser(alpha * latents, t, conditioning)
        assert torch.allclose(prediction.x0, expected, **TOLERANCE)


def test_features_are_the_tokens_within_and_a_copy_has_them_too(
    saved: tuple[StableAudioPipeline, Path],
) -> None:
    denoiser = load_bundle(saved[1]).denoiser
    bundle = load_bundle(saved[1])
    conditioning = bundle.conditioning([PROMPT, ""], SAMPLES, 1)
    x = torch.randn(2, 4, LONGEST)
    t = torch.tensor([0.9, 0.4])
    seen: list[Tensor] = []
    blocks = denoiser.network.transformer_blocks
    for block in blocks:
        block.register_forward_hook(lambda *call: seen.append(call[2]))
    levels = denoiser.features(x, t, conditioning)
    assert len(seen) == 3 and len(blocks) == 4
    assert [level.shape[1] for level in levels] == list(denoiser.backbone.spec.feature_widths)
    for level, tokens in zip(levels, seen, strict=True):
        assert torch.equal(level, tokens.transpose(1, 2)[:, :, 1:])
    encoder = bundle.denoiser.encoder_copy()
    assert len(encoder.network.transformer_blocks) == 3
    for level, again in zip(levels, encoder.features(x, t, conditioning), strict=True):
        assert torch.equal(level, again)


def test_recomputed_blocks_have_the_same_gradients(
    saved: tuple[StableAudioPipeline, Path],
) -> None:
    gradients = []
    for enabled in (False, True):
        bundle = load_bundle(saved[1])
        denoiser = bundle.denoiser
        denoiser.network.requires_grad_(True)
        denoiser.checkpoint_gradients(enabled)
        x = torch.randn(1, 4, LONGEST, generator=torch.Generator().manual_seed(3))
        conditioning = bundle.conditioning([PROMPT], SAMPLES, 1)
        denoiser(x, torch.tensor([0.7]), conditioning).x0.square().mean().backward()
        gradients.append(denoiser.network.proj_in.weight.grad)
    assert float(gradients[0].abs().max()) > 0
    assert torch.allclose(*gradients)


def test_sounds_are_decoded_as_diffusers_does_in_two_channels(
    saved: tuple[StableAudioPipeline, Path],
) -> None:
    pipeline, folder = saved
    codec = load_bundle(folder).codec
    assert isinstance(codec, OobleckCodec)
    latents = torch.randn(2, 4, LONGEST, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents).sample
        peaks = expected.abs().amax(dim=(1, 2), keepdim=True)
        assert float(peaks.max()) > 1  # which is turned down
        assert torch.allclose(codec.decode(latents), expected / peaks.clamp(min=1), **TOLERANCE)
        means = pipeline.vae.encode(expected).latent_dist.mean
    assert torch.allclose(codec.encode(expected), means, **TOLERANCE)
    sounds = codec.items(100 * expected)
    assert [sound.num_channels for sound in sounds] == [2, 2]
    assert sounds[0].seconds == SAMPLES / RATE
    loud = codec.decode(1e3 * latents)
    assert float(loud.abs().max()) <= 1
    pictures = codec.preview(latents)
    assert pictures.shape[:3] == (2, 3, 128) and float(pictures.abs().max()) <= 1
    with pytest.raises(AudioError, match="have 1 channels; the model has 2"):
        codec.encode(torch.zeros(1, 1, SAMPLES))


def test_one_channel_there_may_be_too(tmp_path: Path) -> None:
    save_tiny_pipeline(tmp_path / "mono", channels=1)
    codec = load_bundle(tmp_path / "mono").codec
    (sound,) = codec.items(codec.decode(torch.randn(1, 4, LONGEST)))
    assert sound.samples.shape == (SAMPLES,)


def same_sounds(one: Bundle, other: Bundle) -> bool:
    guided = encode_prompts(one, [PROMPT], (SAMPLES, 1), scale=1.0)
    again = encode_prompts(other, [PROMPT], (SAMPLES, 1), scale=1.0)
    noise = torch.randn(1, 4, LONGEST, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours = sample_latents(one.denoiser, guided, noise, 4, [0])
        theirs = sample_latents(other.denoiser, again, noise, 4, [0])
    # Weights are kept in half precision.
    return bool(torch.allclose(ours, theirs, rtol=0.03, atol=0.03))


def test_what_is_saved_is_read_by_diffusers_and_comes_back(
    saved: tuple[StableAudioPipeline, Path], tmp_path: Path
) -> None:
    pipeline, folder = saved
    bundle = load_bundle(folder)
    # A sound is drawn first: what a tokenizer did before is not written.
    bundle.conditioning([PROMPT], SAMPLES, 1)
    save_bundle(bundle, tmp_path / "again")
    again = load_bundle(tmp_path / "again")
    assert again.contract == bundle.contract and same_sounds(bundle, again)
    scheduler = CosineDPMSolverMultistepScheduler.from_pretrained(
        tmp_path / "again", subfolder="scheduler"
    )
    assert {**scheduler.config} == {**scheduler.config, **_settings(pipeline.scheduler)}
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    theirs = json.loads((folder / "model_index.json").read_text())
    assert index | {"_diffusers_version": theirs["_diffusers_version"]} == theirs
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again/tokenizer")
    assert tokenizer(PROMPT).input_ids == pipeline.tokenizer(PROMPT).input_ids
    assert tokenizer.model_max_length == pipeline.tokenizer.model_max_length
    for part in ("transformer", "vae", "text_encoder", "projection_model"):
        network = getattr(pipeline, part)
        loaded = type(network).from_pretrained(tmp_path / "again" / part)
        before, after = network.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert torch.equal(weight.half(), after[name].half()), name


def _settings(scheduler: Any) -> dict[str, Any]:
    keys = ("sigma_min", "sigma_max", "sigma_data", "sigma_schedule", "prediction_type", "rho")
    return {key: scheduler.config[key] for key in keys}


def test_lengths_that_cannot_be_are_refused(saved: tuple[StableAudioPipeline, Path]) -> None:
    studio = Studio(device="cpu")

    def draw(**wish: Any) -> Any:
        return studio.draw(Request(PROMPT, model=str(saved[1]), steps=2, guidance=1.0, **wish))

    shorter = draw(width=5 * HOP, height=1)
    assert len(shorter.images[0]) == 5 * HOP
    assert any("128x1" in warning for warning in shorter.warnings)
    with pytest.raises(AudioError, match=r"\(0.01 s\) cannot be made: .*multiple of 8 up to 128"):
        draw(width=5 * HOP + 1, height=1)
    with pytest.raises(Exception, match="draws 128x1"):
        draw(width=2 * SAMPLES, height=1)
    codec = load_bundle(saved[1]).codec
    with pytest.raises(AudioError, match=r"0.03 s\) cannot be made.*0.02 s at 8000 Hz"):
        codec.latent_shape(2 * SAMPLES, 1)


def test_missing_and_foreign_parts_are_told(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    without = {name: value for name, value in index.items() if name != "projection_model"}
    (folder / "model_index.json").write_text(json.dumps(without))
    with pytest.raises(ModelError, match="has nothing as its projection_model; expected Stable"):
        load_bundle(folder)
    foreign = index | {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(foreign))
    with pytest.raises(ModelError, match="has FluxTransformer2DModel as its transformer"):
        load_bundle(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    assert is_stable_audio(folder)
    changed(folder / "projection_model/config.json", conditioning_dim=24)
    with pytest.raises(ModelError, match="is 16, and there are 24 numbers of a token"):
        load_bundle(folder)
    changed(folder / "projection_model/config.json", conditioning_dim=16)
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"vae has no \.safetensors weights"):
        load_bundle(folder)
    (folder / "vae/config.json").unlink()
    with pytest.raises(ModelError, match=r"vae/config\.json does not exist: that part"):
        load_bundle(folder)


def test_damaged_parts_are_told(folder: Path) -> None:
    changed(folder / "transformer/config.json", num_layers=3)
    with pytest.raises(ModelError, match=r"transformer: \d+ weights are missing or foreign"):
        load_bundle(folder)
    changed(folder / "transformer/config.json", num_layers=4)
    changed(folder / "tokenizer/tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(ModelError, match="expected how many tokens prompts are filled up to"):
        load_bundle(folder)
    changed(folder / "tokenizer/tokenizer_config.json", model_max_length=6)
    (folder / "tokenizer/tokenizer.json").write_text("no tokenizer")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        load_bundle(folder)


def test_another_scheduler_is_refused(folder: Path) -> None:
    config = folder / "scheduler/scheduler_config.json"
    own = config.read_text()
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(ModelError, match="has the scheduler EulerDiscreteScheduler; expected Cos"):
        load_bundle(folder)
    for damage, told in (
        ({"sigma_data": 0.5}, "sigma_data = 0.5; expected 1"),
        ({"prediction_type": "sample"}, "prediction_type = 'sample'; expected v_prediction or"),
        ({"sigma_schedule": "linear"}, "sigma_schedule = 'linear'; expected exponential or"),
        ({"sigma_max": 0.1}, "is damaged"),
    ):
        config.write_text(own)
        changed(config, **damage)
        with pytest.raises(ModelError, match=told):
            load_bundle(folder)
