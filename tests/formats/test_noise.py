"""Laws of noise other than SDXL's: drawn as diffusers' own schedulers draw them, or refused by
name; never in silence as another.
"""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from twostep.contract import (
    Contract,
    ContractError,
    EdmSpec,
    RectifiedFlowSpec,
    VariancePreservingSpec,
)
from twostep.diffusion import make_schedule, prediction_from_output, solve, trailing_times
from twostep.formats.contracts import SDXL
from twostep.formats.diffusers_names import (
    _EDM,
    _FLOW,
    _VARIANCE_PRESERVING,
    library_defaults,
    noise_of_scheduler,
    scheduler_settings,
)
from twostep.formats.locate import ModelError
from twostep.formats.single_file import SingleFile, noise_marks
from twostep.media.image import ImageCodec
from twostep.models.loading import load_bundle
from twostep.models.sdxl import SdxlFamily
from twostep.models.sdxl_networks import load_schedule
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble, with_sdxl_vae

STEPS = 7
NOISE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
TRAINED = [1e-4 + 0.011 * (i / 999) ** 3 for i in range(1000)]


def network(x: Tensor, time: float) -> Tensor:
    """Something of x and time that a network might answer."""
    return torch.tanh(0.7 * x + 0.1 * x.roll(1, -1) + 0.3 * torch.cos(torch.tensor(time / 250.0)))


def ours(config: dict[str, object]) -> Tensor:
    """Follow the flow as the config of a scheduler is read, in float64; in the model's units."""
    prediction_type, spec = noise_of_scheduler(config, "here")
    schedule = make_schedule(**asdict(spec))

    def denoise(x: Tensor, t: Tensor):
        output = network(x, float(schedule.network_time(t)[0]))
        alpha, sigma = schedule.coefficients(t, x)
        return prediction_from_output(output, x, alpha, sigma, prediction_type)

    times = torch.tensor([*trailing_times(STEPS, schedule), 0], dtype=torch.float64)
    columns = times[:, None].expand(-1, len(NOISE))
    return solve(denoise, NOISE, columns, schedule) * getattr(schedule, "sigma_data", 1.0)


def test_defaults_that_are_written_down_are_those_of_diffusers() -> None:
    names = [*_EDM, *_FLOW, *_VARIANCE_PRESERVING]
    names += ["UNet2DConditionModel", "AutoencoderTiny", "AutoencoderKL"]
    num_compared = 0
    for name in names:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        for key, value in library_defaults(name).items():
            # Of a class whose own requirements are not installed nothing is known.
            if key in parameters:
                assert parameters[key].default == value, f"{name}: {key}"
                num_compared += 1
    assert num_compared > 100


def theirs(config: dict[str, object]) -> Tensor:
    """Let diffusers' own scheduler walk, from the same noise at the same times."""
    kind = getattr(diffusers, str(config["_class_name"]))
    values = {"timestep_spacing": "trailing"} if kind is diffusers.EulerDiscreteScheduler else {}
    scheduler = kind.from_config({**config, **values})
    _, spec = noise_of_scheduler(config, "here")
    schedule = make_schedule(**asdict(spec))
    times = torch.tensor(trailing_times(STEPS, schedule), dtype=torch.float64)
    if isinstance(spec, RectifiedFlowSpec):
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    else:
        scheduler.set_timesteps(STEPS)
    if isinstance(spec, EdmSpec):  # a grid of its own, which ends at the least level
        scheduler.sigmas = torch.cat([schedule.level(times), torch.zeros(1)])
        scheduler.timesteps = scheduler.precondition_noise(scheduler.sigmas[:-1])
    x = NOISE * (1.0 if isinstance(spec, RectifiedFlowSpec) else float(scheduler.sigmas[0]))
    if isinstance(spec, VariancePreservingSpec):
        x = NOISE * (1 + float(scheduler.sigmas[0]) ** 2) ** 0.5
    elif isinstance(spec, EdmSpec):
        x = NOISE * (spec.sigma_data**2 + float(scheduler.sigmas[0]) ** 2) ** 0.5
    for time in scheduler.timesteps:
        given = x if isinstance(spec, RectifiedFlowSpec) else scheduler.scale_model_input(x, time)
        x = scheduler.step(network(given, float(time)), time, x, return_dict=False)[0]
    return x


EULER = "EulerDiscreteScheduler"
EDM = "EDMEulerScheduler"
LAWS = {
    "sdxl": {"_class_name": EULER, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
             "beta_end": 0.012},
    "defaults of the library": {"_class_name": EULER},
    "v": {"_class_name": EULER, "beta_schedule": "scaled_linear",
          "prediction_type": "v_prediction"},
    "zero SNR": {"_class_name": EULER, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                 "beta_end": 0.012, "prediction_type": "v_prediction",
                 "rescale_betas_zero_snr": True},
    "cosine": {"_class_name": EULER, "beta_schedule": "squaredcos_cap_v2",
               "prediction_type": "v_prediction"},
    "trained betas": {"_class_name": EULER, "trained_betas": TRAINED},
    "edm": {"_class_name": EDM},
    "edm of v": {"_class_name": EDM, "prediction_type": "v_prediction", "sigma_data": 1.0,
                 "sigma_max": 120.0, "sigma_schedule": "exponential"},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler"},
    "shifted flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_every_law_is_walked_as_diffusers_does(law: str) -> None:
    """All but the last bits: diffusers keeps its tables in single precision, in which a cosine's
    remaining signal, a 40,000th, has few.
    """
    difference = (ours(LAWS[law]) - theirs(LAWS[law])).norm() / theirs(LAWS[law]).norm()
    assert difference < (5e-4 if law == "cosine" else 2e-5)


def test_the_laws_differ_so_that_none_can_stand_for_another() -> None:
    drawn = [ours(config) for config in LAWS.values()]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert (first - second).norm() / first.norm() > 1e-3


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler",
     "EulerAncestralDiscreteScheduler", "LCMScheduler", "PNDMScheduler",
     "UniPCMultistepScheduler", "TCDScheduler"],
)  # fmt: skip
def test_a_scheduler_without_settings_has_those_of_its_library(name: str) -> None:
    """diffusers' defaults differ: LCM's are Stable Diffusion's, most others those of DDPM."""
    _, spec = noise_of_scheduler({"_class_name": name}, "here")
    abar = make_schedule(**asdict(spec)).alphas[1:] ** 2
    torch.testing.assert_close(
        abar.float(), getattr(diffusers, name)().alphas_cumprod, rtol=1e-4, atol=1e-7
    )


def test_zero_snr_is_rescaled_as_diffusers_does_it() -> None:
    spec = VariancePreservingSpec(zero_snr=True)
    schedule = make_schedule(**asdict(spec))
    config = {**LAWS["zero SNR"], "_class_name": EULER}
    abar = diffusers.EulerDiscreteScheduler.from_config(config).alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas[1:] ** 2, abar, rtol=3e-4, atol=1e-8)
    assert schedule.alphas[1] == pytest.approx((1 - 0.00085) ** 0.5, rel=1e-12)


def test_edm_is_eq_7_of_its_paper() -> None:
    """D = c_skip y + c_out F(c_in y, log(s) / 4), with y = data + s noise."""
    schedule = make_schedule(**asdict(EdmSpec()))
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    s, d = schedule.level(t)[:, None], 0.5
    assert schedule.level(torch.ones(1)).item() == pytest.approx(80, rel=1e-12)
    y, f = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c_in = 1 / (s**2 + d**2).sqrt()
    expected = d**2 / (s**2 + d**2) * y + s * d / (s**2 + d**2).sqrt() * f
    alpha, sigma = schedule.coefficients(t, y)
    got = prediction_from_output(f, c_in * y, alpha, sigma, "edm")
    torch.testing.assert_close(got.x0 * d, expected)
    torch.testing.assert_close(schedule.network_time(t), s[:, 0].log() / 4)
    torch.testing.assert_close(got.eps, (y - expected) / s)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "CogVideoXDPMScheduler"},
            "the scheduler CogVideoXDPMScheduler, whose law",
        ),
        ({"_class_name": "os"}, "the scheduler os, whose law"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "dynamic",
        ),
        ({"beta_schedule": "sigmoid"}, "the schedule 'sigmoid' over 1000 times"),
        ({"num_train_timesteps": 500}, "over 500 times"),
        ({"rescale_betas_zero_snr": True}, "leaves no signal at the top"),
        ({"trained_betas": [0.1, 0.2]}, "trained must be no betas, or 1000"),
        ({"_class_name": EDM, "sigma_max": 1.0}, "sigma_max must be a level that hides the data"),
        ({"prediction_type": "score"}, "predicts 'score'; known are epsilon"),
    ],
)
def test_laws_that_are_not_known_are_refused_by_name(
    config: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        noise_of_scheduler(config, "here")


def test_betas_one_by_one_that_are_sdxl_s_own_are_said_shortly() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    _, spec = noise_of_scheduler({"trained_betas": betas.tolist()}, "here")
    assert spec == VariancePreservingSpec()
    _, own = noise_of_scheduler(LAWS["trained betas"], "here")
    assert own.trained == tuple(TRAINED)
    contract = replace(SDXL, schedule=own)
    assert Contract.from_json(contract.to_json()) == contract
    assert '"trained"' not in SDXL.to_json() and "zero_snr" not in SDXL.to_json()


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        (VariancePreservingSpec(zero_snr=True), "eps"),
        (VariancePreservingSpec(), "edm"),
        (EdmSpec(), "flow"),
    ],
)
def test_a_contract_refuses_what_its_noise_makes_senseless(
    schedule: VariancePreservingSpec | EdmSpec, prediction_type: str
) -> None:
    with pytest.raises(ContractError, match="prediction_type must be"):
        replace(SDXL, schedule=schedule, prediction_type=prediction_type)


def marked(
    folder: Path, metadata: dict[str, str] | None = None, **marks: float | list[float]
) -> SingleFile:
    """A file with these marks beside a weight."""
    tensors = {name.replace("__", "."): torch.tensor(value) for name, value in marks.items()}
    path = folder / "marked.safetensors"
    save_file(tensors | {"model.diffusion_model.x": torch.ones(1)}, path, metadata)
    return SingleFile(path, folder)


CASES: list[tuple[dict, dict, object]] = [
    ({}, {}, (None, None)),
    ({"v_pred": []}, {}, ("v", None)),
    ({}, {"modelspec.prediction_type": "v"}, ("v", None)),
    ({}, {"modelspec.predict_key": "v"}, ("v", None)),
    ({}, {"ss_v_parameterization": "True"}, ("v", None)),
    ({}, {"modelspec.prediction_type": "epsilon"}, ("eps", None)),
    ({}, {"modelspec.prediction_type": "flow"}, ("flow", RectifiedFlowSpec())),
    ({}, {"modelspec.prediction_type": "score"}, "predicts 'score'"),
    ({"v_pred": [], "ztsnr": []}, {}, ("v", VariancePreservingSpec(zero_snr=True))),
    ({"v_pred": []}, {"ss_zero_terminal_snr": "True"},
     ("v", VariancePreservingSpec(zero_snr=True))),
    ({"ztsnr": []}, {}, "zero SNR"),
    ({"edm_vpred.sigma_max": 120.0, "edm_vpred.sigma_min": 0.002}, {},
     ("v", EdmSpec(0.002, 120.0, 1.0, "exponential"))),
    ({"edm_vpred.sigma_max": 80.0}, {}, ("v", EdmSpec(0.002, 80.0, 1.0, "exponential"))),
    ({"edm_vpred.sigma_min": 0.1}, {}, "without edm_vpred.sigma_max"),
    ({"edm_vpred.sigma_max": 1.0}, {}, "a level that hides the data"),
    ({"edm_mean": [0.0], "edm_std": [1.0]}, {}, ("edm", EdmSpec())),
    ({"edm_mean": [0.0]}, {}, "only one of edm_mean and edm_std"),
]  # fmt: skip


@pytest.mark.parametrize(("marks", "metadata", "expected"), CASES)
def test_what_a_single_file_says_of_its_noise(
    tmp_path: Path, marks: dict, metadata: dict, expected: object
) -> None:
    single = marked(tmp_path, metadata, **marks)
    if isinstance(expected, str):
        with pytest.raises(ModelError, match=expected):
            _ = single.prediction_type
        return
    noise = single.noise
    if isinstance(noise.schedule, EdmSpec):
        sigmas = asdict(noise.schedule)
        noise = replace(noise, schedule=EdmSpec(**{
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in sigmas.items()
        }))  # fmt: skip
    assert (noise.prediction_type, noise.schedule) == expected


def test_a_single_file_brings_the_scale_of_its_latents(tmp_path: Path) -> None:
    mean, std = [-1.5, 2.0, -1.25, 2.5], [8.5, 6.0, 6.5, 5.25]
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"scaling_factor": 0.13025}')
    single = marked(tmp_path, edm_mean=[[[[x]] for x in mean]], edm_std=[[[[x]] for x in std]])
    config = single.config("vae")
    assert (config["latents_mean"], config["latents_std"]) == (mean, std)
    assert config["scaling_factor"] == 0.5
    contract = replace(SDXL, schedule=EdmSpec(), prediction_type="edm")
    again = noise_marks(contract, config)
    assert torch.equal(again["edm_std"].flatten(), torch.tensor(std))


def test_what_no_single_file_can_say_is_not_written_into_one() -> None:
    for schedule, prediction_type in (
        (VariancePreservingSpec("linear"), "eps"),
        (VariancePreservingSpec(zero_snr=True), "x0"),
        (EdmSpec(sigma_data=1.0), "v"),
        (RectifiedFlowSpec(), "flow"),
    ):
        contract = replace(SDXL, schedule=schedule, prediction_type=prediction_type)
        with pytest.raises(ModelError, match="which no single file can say"):
            noise_marks(contract, {})
    zero = replace(SDXL, schedule=VariancePreservingSpec(zero_snr=True), prediction_type="v")
    assert set(noise_marks(zero, {})) == {"v_pred", "ztsnr"}


def test_mean_and_deviation_of_latents_are_obeyed() -> None:
    """Latents are (z - mean) scale / std, divided by EDM's unit; and back to the same picture."""
    bundle = with_sdxl_vae(random_bundle(), layers_per_block=1)
    plain = bundle.codec
    mean, std = [-1.5, 2.0, -1.25, 2.5], [8.5, 6.0, 6.5, 5.25]
    vae = plain.vae
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    z = vae.encode(picture).latent_dist.mean
    shown = plain.decode(plain.encode(picture))
    previewed = plain.preview(plain.encode(picture))
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    codec = ImageCodec(vae, deviation=0.5)
    shape = (1, 4, 1, 1)
    expected = (z - torch.tensor(mean).view(shape)) * 0.5 / torch.tensor(std).view(shape) / 0.5
    torch.testing.assert_close(codec.encode(picture), expected)
    torch.testing.assert_close(codec.decode(expected), shown, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.preview(expected), previewed, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], Path]:
    """Write a small SDXL folder without contract, with the config of a scheduler."""
    folder = tmp_path_factory.mktemp("laws") / "mine"
    assemble(random_bundle()).save_pretrained(folder)

    def write(config: dict[str, object]) -> Path:
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.mark.parametrize("law", ["zero SNR", "edm", "edm of v", "shifted flow", "trained betas"])
def test_a_folder_is_loaded_drawn_and_saved_by_its_law(
    law: str, write: Callable[[dict], Path], tmp_path: Path
) -> None:
    folder = write(LAWS[law])
    bundle = load_bundle(folder)
    expected = noise_of_scheduler(LAWS[law], folder)
    assert (bundle.contract.prediction_type, bundle.contract.schedule) == expected
    assert type(load_schedule(folder)) is type(bundle.denoiser.schedule)
    result = generate(bundle, Request("a fox", steps=2, guidance=1.0))
    assert result.images[0].size == (64, 64)
    if law == "edm":
        assert bundle.codec.deviation == 0.5
    SdxlFamily().save(bundle, tmp_path / "again")
    scheduler = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert noise_of_scheduler(scheduler, "again") == expected
    (tmp_path / "again" / "twostep.json").unlink()
    assert load_bundle(tmp_path / "again").contract.schedule == expected[1]


def test_what_configs_leave_out_is_what_diffusers_takes(write: Callable[[dict], Path]) -> None:
    """No key but the class in the scheduler's config, no size in the UNet's, no word in the index
    about the empty prompt.
    """
    folder = write({"_class_name": EULER})
    for part, keys in (
        ("unet/config.json", ("sample_size", "in_channels", "out_channels")),
        ("model_index.json", ("force_zeros_for_empty_prompt",)),
    ):
        values = json.loads((folder / part).read_text())
        (folder / part).write_text(
            json.dumps({key: value for key, value in values.items() if key not in keys})
        )
    bundle = load_bundle(folder)
    schedule = bundle.contract.schedule
    assert (schedule.betas, schedule.beta_start, schedule.beta_end) == ("linear", 0.0001, 0.02)
    assert bundle.contract.sizes[0] == (512, 512)  # 128 latents of 4 pixels
    assert bundle.text.zeros_for_empty


def test_settings_for_diffusers_come_back_as_the_same_law() -> None:
    for config in LAWS.values():
        prediction_type, spec = noise_of_scheduler(config, "here")
        name, settings = scheduler_settings(spec)
        words = {"eps": "epsilon", "edm": "epsilon", "v": "v_prediction"}
        more = {"prediction_type": words.get(prediction_type, "epsilon")}
        assert noise_of_scheduler({"_class_name": name, **settings, **more}, "here") == (
            prediction_type,
            spec,
        )
