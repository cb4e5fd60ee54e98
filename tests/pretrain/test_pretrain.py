"""Pretraining of every part on the committed sample: losses fall, a resumed run equals an
uninterrupted one.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.evaluate.judge import load_judge
from twostep.formats.locate import ModelError
from twostep.media.image import ImageCodec
from twostep.models.loading import load_bundle, load_with_loras
from twostep.pipeline.generation import generate
from twostep.pipeline.request import Request
from twostep.pretrain.control import build_control
from twostep.pretrain.drawings import DrawingSet, save_drawings
from twostep.pretrain.latents import cache_latents
from twostep.pretrain.loop import NetworkLoopSettings
from twostep.pretrain.model import random_bundle
from twostep.pretrain.parts import load_part, recipe_names
from twostep.pretrain.sizes import NANO, ModelSize
from twostep.pretrain.teacher import TeacherSettings, new_denoiser, train_teacher
from twostep.pretrain.text import TextSettings, train_text
from twostep.pretrain.vae import VaeSettings, train_vae
from twostep.training.loop import TrainingError, learning_rate_factor
from twostep.training.run_folder import RunFolder

from .conftest import tiny_loop

MINI = Path(__file__).parents[2] / "examples" / "mini"

Weights = dict[str, torch.Tensor]
Run = Callable[..., Weights]


def run_vae(
    emoji: DrawingSet, folder: Path, on_iteration: Callable[..., None], **changes: Any
) -> Weights:
    settings = VaeSettings.model_validate({"num_pictures": 8, "loop": tiny_loop(**changes)})
    return train_vae(
        emoji, settings, RunFolder(folder, settings), on_iteration=on_iteration
    ).vae.state_dict()


def run_text(
    emoji: DrawingSet, folder: Path, on_iteration: Callable[..., None], **changes: Any
) -> Weights:
    settings = TextSettings.model_validate({"loop": tiny_loop(**changes)})
    text = train_text(emoji, settings, RunFolder(folder, settings), on_iteration=on_iteration)
    return text.encoders[1].state_dict()


def run_teacher(
    emoji: DrawingSet, folder: Path, on_iteration: Callable[..., None], **changes: Any
) -> Weights:
    random = random_bundle()
    settings = TeacherSettings.model_validate({"loop": tiny_loop(**changes)})
    latents = cache_latents(emoji, random.codec, pixels=64, variants=1)
    denoiser = train_teacher(
        new_denoiser(NANO, settings.loop.seed),
        latents,
        random.text,
        settings,
        RunFolder(folder, settings),
        pixels=64,
        on_iteration=on_iteration,
    )
    return denoiser.network.state_dict()


RUNS = pytest.mark.parametrize(
    "run", [run_vae, run_text, pytest.param(run_teacher, marks=pytest.mark.slow)]
)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(run_vae, marks=pytest.mark.slow),
        run_text,
        pytest.param(run_teacher, marks=pytest.mark.slow),
    ],
)
def test_the_loss_falls(run: Run, emoji: DrawingSet, tmp_path: Path) -> None:
    losses: list[float] = []
    run(
        emoji,
        tmp_path,
        lambda i, figures: losses.append(figures["loss"]),
        iterations=40,
        batch_size=16,
    )
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@RUNS
def test_interrupted_and_resumed_equals_uninterrupted(
    run: Run, emoji: DrawingSet, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3:
            raise Killed

    def nothing(iteration: int, figures: dict[str, float]) -> None:
        return None

    whole = run(emoji, tmp_path / "whole", nothing)
    with pytest.raises(Killed):
        run(emoji, tmp_path / "cut", die)
    resumed = run(emoji, tmp_path / "cut", nothing)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_a_loss_that_explodes_is_told_with_what_to_do(emoji: DrawingSet, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"vae loss is nan at iteration \d+.*lower learning_rate"
    ):
        run_vae(emoji, tmp_path, lambda i, figures: None, learning_rate=1e30)


def test_the_rate_warms_up_stays_and_decays() -> None:
    settings = NetworkLoopSettings.model_validate(tiny_loop(iterations=1000, warmup_iterations=100))
    rates = [learning_rate_factor(i, settings) for i in range(1000)]
    assert rates[0] == 0.01
    assert rates[100] == rates[749] == 1.0
    assert rates[-1] < 0.03
    assert all(after <= before for before, after in pairwise(rates[750:]))


def test_the_three_recipes_make_a_model_that_loads(emoji: DrawingSet, tmp_path: Path) -> None:
    def make(name: str, out: Path, *overrides: str) -> None:
        quick = ["loop.iterations=2", "loop.batch_size=4", "loop.precision=fp32"]
        part = load_part(name, ["device=cpu", *quick, *overrides])
        part.train(emoji, out)

    vae, text, teacher = (tmp_path / name for name in ("vae", "text", "teacher"))
    make("nano-vae", vae, "num_pictures=8")
    make("nano-text", text)
    where = [f"autoencoder={vae / 'model'}", f"text_encoders={text / 'model'}"]
    make("nano-teacher", teacher, "variants=1", *where)
    bundle = load_bundle(teacher / "model")
    assert bundle.contract.recipe == "nano-teacher"
    request = Request("a fox", steps=2)
    assert generate(bundle, request).images[0].size == (64, 64)


def test_every_recipe_of_the_package_is_accepted() -> None:
    assert {"nano-vae", "nano-text", "nano-teacher", "nano-judge"} < set(recipe_names())
    for name in recipe_names():
        assert load_part(name).settings.size == name.split("-")[0]


def test_a_part_that_is_none_is_told(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('part = "unet"\n')
    for name, complaint in (
        ("nano-unet", "nano-judge, nano-motion, nano-noto, nano-openmoji, nano-silhouette, "),
        (str(recipe), 'part = "unet" is none of vae, text, teacher, joint, tune, control, style'),
    ):
        answer = CliRunner().invoke(app, ["pretrain", name, "--out", "x"], env={"COLUMNS": "400"})
        assert answer.exit_code == 1
        assert complaint in answer.stderr


def test_the_command_trains_a_part_on_the_drawings_it_is_given(
    emoji: DrawingSet, tmp_path: Path
) -> None:
    save_drawings(emoji, tmp_path / "drawings")
    quick = ["loop.iterations=1", "loop.batch_size=4", "num_held_out=1", "device=cpu"]
    overrides = [word for override in quick for word in ("-o", override)]
    out = tmp_path / "judge"
    answer = CliRunner().invoke(
        app,
        [
            *("pretrain", "nano-judge", "--out", str(out)),
            *("--drawings", str(tmp_path / "drawings")),
            *overrides,
        ],
        env={"COLUMNS": "400"},
    )
    assert answer.exit_code == 0, answer.output
    assert load_judge(out / "judge.safetensors").classes.concepts == emoji.concepts


def test_a_control_net_learns_and_changes_nothing_at_first(
    emoji: DrawingSet, tmp_path: Path
) -> None:
    quick = ["loop.iterations=2", "loop.batch_size=4", "loop.precision=fp32", "variants=1"]
    part = load_part("nano-silhouette", ["device=cpu", *quick])
    folder = part.train(emoji, tmp_path / "control")
    zeros = build_control(random_bundle().denoiser).controlnet_mid_block
    assert all(bool((value == 0).all()) for value in zeros.state_dict().values())
    trained = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert bool(trained["controlnet_mid_block.weight"].abs().sum() > 0)


def test_a_style_lora_is_trained_and_goes_on_the_teacher(emoji: DrawingSet, tmp_path: Path) -> None:
    quick = ["loop.iterations=3", "loop.batch_size=4", "variants=1"]
    path = load_part("nano-noto", ["device=cpu", *quick]).train(emoji, tmp_path / "style")
    bundle = load_with_loras("nano", [str(path)])
    plain = load_bundle("nano")
    key = "mid_block.attentions.0.proj_in.weight"
    changed = bundle.denoiser.network.state_dict()[key]
    assert not torch.equal(changed, plain.denoiser.network.state_dict()[key])
    prompts = (tmp_path / "style" / "prompts.txt").read_text().splitlines()
    assert len(prompts) > 400
    assert not any("noto" in prompt for prompt in prompts)


def test_an_autoencoder_is_trained_on_from_another_run(emoji: DrawingSet, tmp_path: Path) -> None:
    def train(out: str, **changes: Any) -> ImageCodec:
        settings = VaeSettings.model_validate(
            {"num_pictures": 8, "loop": {**tiny_loop(), "warmup_iterations": 0}, **changes}
        )
        return train_vae(emoji, settings, RunFolder(tmp_path / out, settings))

    first = train("first")
    first.vae.save_pretrained(tmp_path / "model" / "vae")
    # At a rate of next to nothing it is what it began with, to a rounding.
    still = tiny_loop(learning_rate=1e-12, weight_decay=0.0)
    second = train("second", start=str(tmp_path / "model"), loop=still)
    for name, value in second.vae.state_dict().items():
        assert torch.allclose(value, first.vae.state_dict()[name], atol=1e-6), name
    with pytest.raises(ModelError, match="missing"):
        train("third", start=str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="foreign"):
        train("fourth", start=str(MINI))


def test_checkpointed_gradients_are_the_same(emoji: DrawingSet, tmp_path: Path) -> None:
    def losses(name: str, **changes: Any) -> list[float]:
        heard: list[float] = []
        settings = VaeSettings.model_validate({"num_pictures": 8, "loop": tiny_loop(), **changes})
        folder = RunFolder(tmp_path / name, settings)
        train_vae(emoji, settings, folder, on_iteration=lambda i, seen: heard.append(seen["loss"]))
        return heard

    assert losses("kept") == pytest.approx(losses("anew", gradient_checkpointing=True), rel=1e-6)


def test_a_model_of_another_size_is_made_of_the_same_parts(tmp_path: Path) -> None:
    small = ModelSize(
        name="small",
        pixels=64,
        latent_channels=4,
        vae_channels=(16, 16, 16, 16),
        encoder_blocks=(1, 1, 1, 1),
        decoder_blocks=(1, 1, 1, 1),
        unet_channels=(16, 32),
        unet_heads=(2, 4),
        unet_layers=1,
        transformer_layers=(1, 1),
        norm_groups=8,
        text_widths=(16, 32),
        text_layers=(1, 2),
        text_heads=2,
        max_tokens=16,
        time_id_width=8,
    )
    bundle = random_bundle(size=small)
    assert small.latent_pixels == 8
    assert bundle.latent_shape(64, 64) == (4, 8, 8)
    assert generate(bundle, Request("a fox", steps=2)).images[0].size == (64, 64)
