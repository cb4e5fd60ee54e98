"""Models of others: a vanilla SDXL folder is read by its configs, and what is none is told by what
it is.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.contract import RectifiedFlowSpec
from twostep.diffusion import RectifiedFlow
from twostep.export.writing import export
from twostep.formats import read_contracts
from twostep.formats.locate import ModelError, find_model
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return random_bundle()


@pytest.fixture
def vanilla(bundle: Bundle, tmp_path: Path) -> Path:
    """A folder as diffusers writes it: no contract, another spacing, zeros for the empty prompt."""
    pipeline = assemble(bundle, zeros_for_empty=True, prediction_type="v_prediction")
    pipeline.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_its_contract_is_derived_from_its_configs(vanilla: Path) -> None:
    (contract,) = read_contracts(vanilla)
    assert (contract.name, contract.role, contract.prediction_type) == ("mine", "teacher", "v")
    assert (contract.steps, contract.guidance, contract.sizes[0]) == (32, 6.0, (64, 64))


def test_it_loads_and_computes_the_same(vanilla: Path, bundle: Bundle) -> None:
    loaded = load_bundle(vanilla)
    assert loaded.denoiser.prediction_type == "v"
    x_t, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1000, 300]),
    )
    conditioning = bundle.conditioning(["a red fox", "a bird"], 64, 64)
    torch.testing.assert_close(
        loaded.conditioning(["a red fox", "a bird"], 64, 64).text, conditioning.text
    )
    torch.testing.assert_close(
        loaded.denoiser.network(
            x_t, t, conditioning.text, added_cond_kwargs=_added(conditioning)
        ).sample,
        bundle.denoiser.network(
            x_t, t, conditioning.text, added_cond_kwargs=_added(conditioning)
        ).sample,
    )


def _added(conditioning) -> dict[str, torch.Tensor]:
    return {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}


def test_the_empty_prompt_is_zeros_where_the_index_says_so(
    vanilla: Path, bundle: Bundle, tmp_path: Path
) -> None:
    loaded = load_bundle(vanilla)
    text, pooled = loaded.text.encode(["a red fox", ""])
    assert text[1].abs().max() == pooled[1].abs().max() == 0
    assert text[0].abs().max() > 0
    save_bundle(loaded, tmp_path / "again")
    again = load_bundle(tmp_path / "again")
    assert again.text.zeros_for_empty
    assert again.denoiser.prediction_type == "v"
    scheduler = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["timestep_spacing"]) == (
        "v_prediction",
        "trailing",
    )
    plain, _ = bundle.text.encode([""])
    assert plain.abs().max() > 0


def test_the_noise_schedule_of_the_config_stays(vanilla: Path, tmp_path: Path) -> None:
    change(vanilla / "scheduler" / "scheduler_config.json", beta_schedule="linear", beta_end=0.02)
    loaded = load_bundle(vanilla)
    assert (loaded.contract.schedule.betas, loaded.contract.schedule.beta_end) == ("linear", 0.02)
    save_bundle(loaded, tmp_path / "again")
    scheduler = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_schedule"], scheduler["beta_end"]) == ("linear", 0.02)


def test_a_rectified_flow_is_saved_and_loaded_by_its_contract(
    bundle: Bundle, tmp_path: Path
) -> None:
    spec = RectifiedFlowSpec(shift=3.0)
    contract = replace(bundle.contract, prediction_type="flow", schedule=spec)
    save_bundle(replace(bundle, contract=contract), tmp_path / "flow")
    loaded = load_bundle(tmp_path / "flow")
    assert loaded.contract == contract
    assert loaded.denoiser.prediction_type == "flow"
    assert isinstance(loaded.denoiser.schedule, RectifiedFlow)
    assert loaded.denoiser.schedule.shift == 3.0
    scheduler = json.loads((tmp_path / "flow" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert scheduler["shift"] == 3.0
    for to in ("comfyui", "unet"):
        with pytest.raises(ModelError, match=f"predicts flow, which programs that read {to} files"):
            export(tmp_path / "flow", to, tmp_path / "x.safetensors")


def test_weights_in_half_precision_alone_are_found(vanilla: Path) -> None:
    for path in vanilla.glob("*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert load_bundle(vanilla).contract.name == "mine"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "is FluxPipeline.*nothing else is distilled",
        ),
        ("unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type 'text'"),
        ("unet/config.json", {"in_channels": 8}, "8 channels; expected 4, or 9 to inpaint"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "predicts 'flow'"),
        (
            "scheduler/scheduler_config.json",
            {"rescale_betas_zero_snr": True, "prediction_type": "epsilon"},
            "leaves no signal at the top",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "over 500 times"),
        ("unet/config.json", {"sample_size": "8"}, "sample_size = '8'; expected the side"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor = 0; expected a number above 0"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor = 'x'; expected a number"),
        ("vae/config.json", {"latents_std": [1, 1]}, r"\[1, 1\]; expected 4 numbers above 0"),
        ("vae/config.json", {"latents_std": [1, 1, 1, 0]}, "expected 4 numbers above 0"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, None]}, "None]; expected 4 numbers"),
    ],
)
def test_what_is_no_teacher_is_told_by_what_it_is(
    vanilla: Path, file: str, values: dict[str, object], message: str
) -> None:
    change(vanilla / file, **values)
    with pytest.raises(ModelError, match=message):
        load_bundle(vanilla)


def test_an_inpainting_base_draws_and_is_no_teacher(vanilla: Path, bundle: Bundle) -> None:
    unet = UNet2DConditionModel.from_config({**bundle.denoiser.network.config, "in_channels": 9})
    unet.save_pretrained(vanilla / "unet")
    loaded = load_bundle(vanilla)
    assert loaded.is_inpainting and not bundle.is_inpainting
    assert loaded.latent_shape(64, 64) == bundle.latent_shape(64, 64)
    assert generate(loaded, Request("a fox", steps=2)).images[0].size == (64, 64)
    with pytest.raises(ModelError, match="mine has an inpainting UNet, which is no teacher here"):
        loaded.as_teacher()
    answer = CliRunner().invoke(
        app, ["plan", "nano", "-o", f"model={vanilla}"], env={"COLUMNS": "300"}
    )
    assert answer.exit_code == 1 and "no teacher here: distil its base" in answer.stderr


def test_pickles_missing_parts_and_damage_are_told(vanilla: Path) -> None:
    (weights,) = (vanilla / "unet").glob("*.safetensors")
    weights.rename(vanilla / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="Pickled weights can run code"):
        load_bundle(vanilla)
    (vanilla / "vae" / "config.json").write_text("{half")
    with pytest.raises(ModelError, match="damaged"):
        load_bundle(vanilla)
    (vanilla / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="part of the model is missing"):
        load_bundle(vanilla)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_weights_that_are_missing_foreign_misshapen_or_cut_off_are_told(
    part: str, vanilla: Path
) -> None:
    """diffusers and transformers would put random weights in the place of missing ones."""
    (path,) = (vanilla / part).glob("*.safetensors")
    whole, weights = path.read_bytes(), load_file(path)
    key = sorted(weights)[3]
    for changed, message in (
        (
            {name: value for name, value in weights.items() if name != key},
            f"{part}: 1 weights are missing or foreign, as ",
        ),
        (
            weights | {"other.weight": torch.ones(1)},
            r"1 weights are missing or foreign, as .*other\.weight",
        ),
        (
            weights | {key: torch.ones(7, 7)},
            rf"{part} has other sizes than its config: .* is \[7, 7\], not \[",
        ),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ModelError, match=message):
            load_bundle(vanilla)
    path.write_bytes(whole[:-7])
    with pytest.raises(ModelError, match=rf"{path.name} is no whole safetensors file"):
        load_bundle(vanilla)
    path.unlink()
    # as in a hub cache that was half downloaded
    path.symlink_to(vanilla / "blobs" / "not yet here")
    with pytest.raises(ModelError, match=rf"{part} has no .safetensors weights"):
        load_bundle(vanilla)


def test_a_refiner_and_a_pickle_are_told(vanilla: Path, tmp_path: Path) -> None:
    change(
        vanilla / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        requires_aesthetics_score=True,
    )
    with pytest.raises(ModelError, match="is the SDXL refiner"):
        load_bundle(vanilla)
    torch.save({"x": torch.ones(1)}, tmp_path / "model.ckpt")
    for load in (load_bundle, read_contracts):
        with pytest.raises(ModelError, match=r"is a pickle.*weights_only=True"):
            load(tmp_path / "model.ckpt")


def test_a_hub_id_is_taken_from_the_cache_when_offline(
    vanilla: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--some--sdxl" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    vanilla.rename(snapshot)
    (tmp_path / "hub" / "models--some--sdxl" / "refs").mkdir()
    (tmp_path / "hub" / "models--some--sdxl" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model("some/sdxl") == snapshot
    with pytest.raises(ModelError, match="other/sdxl is neither a folder here nor"):
        find_model("other/sdxl")
