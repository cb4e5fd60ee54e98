"""The chain: every stage hands its student on, and what is released loads and says how to sample
it.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from twostep.distill import DistillRecipe, distil
from twostep.distill.chain import fingerprints, prepared_stages
from twostep.distill.methods.discriminator import Discriminator, LoraDiscriminator
from twostep.formats import resolve
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.adapters import Lora, add_lora
from twostep.pretrain.model import random_bundle
from twostep.training.device import find_device
from twostep.training.recipe import RecipeError
from twostep.training.run_folder import RunFolder

from .test_trainer import CONDITIONAL, CONVERSION, REGRESSION, UNCONDITIONAL

SHARED = {
    "iterations": 1,
    "batch_size": 2,
    "learning_rate": 1e-4,
    "checkpoint_every": 1,
    "log_every": 1,
    "precision": "fp32",
}


def make_recipe(*stages: dict[str, object], **values: object) -> DistillRecipe:
    return DistillRecipe.model_validate(
        {"sample_prompts": ["a red fox"], "defaults": SHARED, "stages": stages, **values}
    )


def stage(
    student_steps: int,
    teacher_steps: int | None,
    method: dict[str, object],
    **settings: object,
) -> dict[str, object]:
    values = {"student_steps": student_steps, "method": method, **settings}
    return values if teacher_steps is None else {"teacher_steps": teacher_steps, **values}


RECIPE = make_recipe(
    stage(32, 128, REGRESSION, guidance=3.0),
    stage(8, 32, CONDITIONAL),
    stage(4, 8, UNCONDITIONAL, offload=True),
    stage(2, 8, UNCONDITIONAL),
    stage(1, None, CONVERSION),
    stage(1, 4, UNCONDITIONAL),
    release=[4, 2, 1],
    sample_prompts=["a red fox", ""],
)


def test_the_whole_chain_runs_and_its_students_load(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run", RECIPE)
    with pytest.warns(UserWarning, match="offload does nothing on cpu"):
        written = distil(RECIPE, teacher, source, folder, version="0", recipe_name="test")
    assert sorted(written) == [1, 2, 4]
    one = load_bundle(tmp_path / "run" / "model", steps=1)
    assert one.contract.prediction_type == one.denoiser.prediction_type == "x0"
    assert one.contract.trained_times == (1000, 750, 500, 250)
    assert one.students == (4, 2, 1)
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == len(RECIPE.stages)
    before = {steps: path.read_bytes() for steps, path in written.items()}
    again = distil(RECIPE, teacher, source, folder, version="0", recipe_name="test")
    assert {steps: path.read_bytes() for steps, path in again.items()} == before


def test_an_inpainting_model_is_refused_before_anything_runs(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    network = UNet2DConditionModel.from_config(
        {**teacher.denoiser.network.config, "in_channels": 9}
    )
    inpainting = replace(teacher, denoiser=teacher.denoiser.with_network(network))
    folder = RunFolder(tmp_path / "run", RECIPE)
    with pytest.raises(ModelError, match="random has an inpainting UNet, which is no teacher here"):
        distil(RECIPE, inpainting, source, folder, version="0", recipe_name="test")
    assert not (tmp_path / "run" / "model").exists()


def test_conversion_keeps_the_students_x0(teacher: Bundle) -> None:
    """Same weights, other prediction type: the converted student must be trained towards the eps
    student's x0.
    """
    t = torch.tensor([1000, 500])
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = teacher.text.conditioning(["a red fox", ""], 64, 64)
    as_eps = teacher.denoiser(x, t, conditioning)
    as_x0 = replace(teacher.denoiser, prediction_type="x0")(x, t, conditioning)
    assert torch.allclose(as_x0.x0, as_eps.eps)
    assert not torch.allclose(as_x0.x0, as_eps.x0)


def test_a_student_teaches_in_its_own_steps_without_guidance(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    contract = replace(
        teacher.contract, role="student", steps=8, guidance=1.0, trained_times=(1000,)
    )
    student = replace(teacher, contract=contract)

    def chain(teacher_steps: int = 8, **settings: object) -> None:
        recipe = make_recipe(stage(4, teacher_steps, REGRESSION, **settings), release=[])
        folder = RunFolder(tmp_path / f"{teacher_steps}{settings}", recipe)
        distil(recipe, student, source, folder, version="0", recipe_name="test")

    chain()
    with pytest.raises(RecipeError, match="wants 32 steps of random, which draws in exactly 8"):
        chain(teacher_steps=32)
    with pytest.raises(RecipeError, match="guidance 2 of random, a student"):
        chain(guidance=2.0)


def test_a_device_that_is_not_here_is_told() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    with pytest.raises(RecipeError, match='device "nowhere" is not to be had'):
        find_device("nowhere")


LORAS = make_recipe(
    stage(32, 128, REGRESSION, guidance=3.0, lora_rank=4),
    stage(8, 32, CONDITIONAL, lora_rank=4),
    stage(4, 8, UNCONDITIONAL, lora_rank=4),
    stage(2, 8, UNCONDITIONAL),
    release=[8, 4],
)


@pytest.mark.slow
def test_a_chain_of_loras_shares_one_base_and_leaves_it_as_it_was(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    base = {key: value.clone() for key, value in teacher.denoiser.network.state_dict().items()}
    written = distil(
        LORAS, teacher, source, RunFolder(tmp_path / "run", LORAS), version="0", recipe_name="test"
    )
    assert list(teacher.denoiser.network.state_dict()) == list(base)
    assert all(
        torch.equal(value, base[key])
        for key, value in teacher.denoiser.network.state_dict().items()
    )
    assert {steps: path.name for steps, path in written.items()} == {
        8: "random_8step_lora.safetensors",
        4: "random_4step_lora.safetensors",
    }
    before = {steps: path.read_bytes() for steps, path in written.items()}
    again = distil(
        LORAS, teacher, source, RunFolder(tmp_path / "run", LORAS), version="0", recipe_name="test"
    )
    assert {steps: path.read_bytes() for steps, path in again.items()} == before


@pytest.mark.slow
def test_a_released_lora_loads_as_what_was_trained(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run", LORAS)
    written = distil(LORAS, teacher, source, folder, version="0", recipe_name="test")
    loaded = load_bundle(written[4])
    assert (loaded.contract.lora_rank, loaded.contract.lora_alpha) == (4, 4.0)
    assert list(loaded.denoiser.network.state_dict()) == list(teacher.denoiser.network.state_dict())
    kept = folder.load("4-adversarial-unconditional-lora-finished")
    assert kept is not None
    lora = add_lora(teacher.denoiser.network, "check", rank=4)
    lora.load_state_dict(kept["weights"])
    t, x = (
        torch.tensor([1000]),
        torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    conditioning = teacher.text.conditioning(["a red fox"], 64, 64)
    expected = replace(teacher.denoiser, lora="check")(x, t, conditioning).eps
    # fp16
    torch.testing.assert_close(
        loaded.denoiser(x, t, conditioning).eps, expected, atol=5e-3, rtol=5e-3
    )


def test_a_discriminator_on_the_shared_base_starts_as_its_teacher_and_learns_alone(
    teacher: Bundle, source: object
) -> None:
    network = teacher.denoiser.network
    add_lora(network, "8-step", rank=4)
    kept, running = Lora(network, "8-step"), add_lora(network, "student", rank=4)
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.add_(0.05)
    taught = replace(teacher.denoiser, lora="8-step")
    judge = LoraDiscriminator(taught, conditional=True, rank=4)
    x, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1000, 500]),
    )
    conditioning = teacher.text.conditioning(["a red fox", ""], 64, 64)
    merged = Discriminator(taught, conditional=True)
    torch.testing.assert_close(
        judge.features(x, t, conditioning),
        merged.features(x, t, conditioning),
        atol=1e-3,
        rtol=1e-4,
    )
    assert all(parameter.requires_grad for parameter in running.parameters())
    judge.judge(
        judge.features(x, t, conditioning), judge.features(x, t, conditioning)
    ).sum().backward()
    assert all(parameter.grad is not None for parameter in judge.lora.parameters())
    others = [*kept.parameters(), *running.parameters()]
    assert all(parameter.grad is None for parameter in others)
    state = judge.state_dict()
    again = LoraDiscriminator(taught, conditional=True, rank=4)
    again.load_state_dict(state)
    assert all(
        torch.equal(value, state["heads"][key]) for key, value in again.heads.state_dict().items()
    )


@pytest.mark.slow
def test_a_whole_stage_on_one_base_resumes_bit_for_bit(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    method = {**CONDITIONAL, "discriminator_lora": True}
    settings = {"lora_rank": 4, "gradient_checkpointing": True, "iterations": 4}
    recipe = make_recipe(stage(4, 8, method, checkpoint_every=2, **settings), release=[4])

    class Killed(Exception):
        pass

    def die(stage: object, iteration: int, figures: object) -> None:
        if iteration == 3:
            raise Killed

    options = {"version": "0", "recipe_name": "test"}
    whole = distil(recipe, teacher, source, RunFolder(tmp_path / "whole", recipe), **options)
    with pytest.raises(Killed):
        distil(
            recipe,
            teacher,
            source,
            RunFolder(tmp_path / "cut", recipe),
            on_iteration=die,
            **options,
        )
    resumed = distil(recipe, teacher, source, RunFolder(tmp_path / "cut", recipe), **options)
    assert resumed[4].read_bytes() == whole[4].read_bytes()


@pytest.mark.slow
def test_a_base_of_16_bits_holds_loras_of_32_and_whole_students_too(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    expected = _losses(LORAS, random_bundle(), source, tmp_path / "fp32")
    half = LORAS.model_copy(update={"base_precision": "bf16"})
    found = _losses(half, teacher, source, tmp_path / "bf16")
    assert teacher.denoiser.network.dtype == torch.bfloat16
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05)
    for path in (tmp_path / "bf16" / "checkpoints").glob("*-finished.pt"):
        kept = torch.load(path, weights_only=True)["weights"]
        assert {value.dtype for value in kept.values()} == {torch.float32}, path
    assert {value.dtype for value in teacher.text.encoders[0].state_dict().values()} == {
        torch.float32
    }


def _losses(recipe: DistillRecipe, teacher: Bundle, source: object, out: Path) -> list[float]:
    distil(recipe, teacher, source, RunFolder(out, recipe), version="0", recipe_name="test")
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [
        line[name]
        for line in lines
        for name in ("student_loss", "discriminator_loss")
        if name in line
    ]


@pytest.mark.slow
def test_a_style_is_trained_on_from_itself_on_a_student_against_the_styled_teacher(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    style = add_lora(
        random_bundle().denoiser.network, "x", rank=4, targets=("to_q", "to_v")
    ).state_dict()
    style = {f"unet.{key}": value + 0.05 for key, value in style.items()}
    save_file(style, tmp_path / "ink.safetensors")
    recipe = make_recipe(
        stage(2, 4, REGRESSION, lora_rank=4),
        stage(2, 4, UNCONDITIONAL, lora_rank=4),
        release=[2],
        start_steps=2,
        style_lora=str(tmp_path / "ink.safetensors"),
    )
    start = random_bundle().denoiser
    with torch.no_grad():
        start.network.conv_out.bias += 0.1
    before = {key: value.clone() for key, value in start.network.state_dict().items()}
    folder = RunFolder(tmp_path / "run", recipe)
    (written,) = distil(
        recipe, teacher, source, folder, version="0", recipe_name="test", start=start
    ).values()
    found, contract = load_file(written), resolve(written).contract
    assert (contract.name, contract.base, contract.lora_rank) == ("ink-2step", "random-2step", 4)
    assert found.keys() == style.keys()
    # a teacher with a style is no base of anything
    assert not (folder.path / "model" / "unet").exists()
    changes = [(found[key].float() - value).abs().max() for key, value in style.items()]
    assert 0 < max(changes) < 0.01
    assert all(torch.equal(value, before[key]) for key, value in start.network.state_dict().items())
    wrong = recipe.model_copy(
        update={"stages": (recipe.stages[0].model_copy(update={"lora_rank": 8}),)}
    )
    with pytest.raises(RecipeError, match="has lora_rank 8; the LoRA that it trains on has 4"):
        folder = RunFolder(tmp_path / "wrong", wrong)
        distil(wrong, teacher, source, folder, version="0", recipe_name="test", start=start)


ALPHA = {"lora_rank": 4, "lora_alpha": 12.0, "lora_targets": ["attention", "time"]}


@pytest.mark.slow
def test_alpha_layers_and_dropout_of_a_lora_reach_its_file(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    """The file's own alpha is its rank, for three times that is in its weights; and every run drops
    the same inputs.
    """
    recipe = make_recipe(
        stage(4, 8, REGRESSION, **ALPHA, lora_dropout=0.5, iterations=2, learning_rate=1e-3),
        stage(2, 4, REGRESSION, lora_rank=4),
        release=[4],
    )
    folder = RunFolder(tmp_path / "run", recipe)
    written = distil(recipe, teacher, source, folder, version="0", recipe_name="test")
    contract = resolve(written[4]).contract
    assert (contract.lora_rank, contract.lora_alpha) == (4, 4.0)
    kept = folder.load("4-regression-lora-finished")
    assert kept is not None
    in_file = load_file(written[4])
    assert in_file.keys() == {f"unet.{key}" for key in kept["weights"]}
    assert all(".attn" in key or "time_emb_proj" in key for key in in_file)
    for key, value in kept["weights"].items():
        scale = 3 if "lora_B" in key else 1
        assert torch.equal(in_file[f"unet.{key}"], (scale * value).half())
    again = distil(
        recipe,
        random_bundle(),
        source,
        RunFolder(tmp_path / "again", recipe),
        version="0",
        recipe_name="test",
    )
    assert again[4].read_bytes() == written[4].read_bytes()


def first_stage(teacher: Bundle, *stages: dict[str, object]) -> Lora:
    """The LoRA that is trained in the last of some stages, of which none is run."""
    for prepared in prepared_stages(make_recipe(*stages), teacher):
        student = prepared.student
    assert student.lora is not None
    return Lora(student.network, student.lora)


def test_one_lora_runs_through_all_stages(teacher: Bundle, tmp_path: Path) -> None:
    lora = first_stage(teacher, stage(4, 8, REGRESSION, **ALPHA))
    path = tmp_path / "start.safetensors"
    save_file({f"unet.{key}": value for key, value in lora.scaled_state_dict().items()}, path)
    first = stage(4, 8, REGRESSION, lora_rank=4, lora_alpha=2.0, lora_start=str(path))
    started = first_stage(random_bundle(), first, stage(2, 4, REGRESSION, lora_rank=4))
    assert (started.alpha, started.layers) == (2, lora.layers)
    for changes, words in (
        ({"lora_alpha": 4.0}, "lora_alpha 4; the LoRA that it trains on has 2"),
        ({"lora_targets": ["time"]}, "has other lora_targets"),
    ):
        second = stage(2, 4, REGRESSION, lora_rank=4, **changes)
        with pytest.raises(RecipeError, match=words):
            first_stage(random_bundle(), first, second)
    with pytest.raises(RecipeError, match="has lora_rank 8; the LoRA that it trains on has 4"):
        first_stage(random_bundle(), {**first, "lora_rank": 8})


def test_settings_of_a_lora_need_one() -> None:
    for changes in ({"lora_alpha": 4.0}, {"lora_dropout": 0.1}, {"lora_targets": ["time"]}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} is of a LoRA"):
            make_recipe(stage(4, 8, REGRESSION, **changes))
    first = stage(4, 8, REGRESSION, lora_rank=4)
    second = stage(2, 4, REGRESSION, lora_rank=4, lora_start="a.safetensors")
    with pytest.raises(ValueError, match=r"start from a\.safetensors: it trains the LoRA of the"):
        make_recipe(first, second)
    with pytest.raises(ValueError, match="both style_lora and lora_start"):
        make_recipe(second | {"teacher_steps": 8}, style_lora="b.safetensors")


def test_a_lora_that_is_started_from_is_known_by_its_contents(
    teacher: Bundle, source: object, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    recipe = make_recipe(stage(4, 8, REGRESSION, lora_rank=4, lora_start=str(path)))
    found = []
    for value in (0.0, 1.0):
        save_file({"unet.x.lora_A.weight": torch.full((4, 4), value)}, path)
        found.append(fingerprints(recipe, teacher, source, None))
    assert found[0].keys() == {"model", "stages.0.lora_start"}
    assert found[0]["model"] == found[1]["model"]
    assert found[0]["stages.0.lora_start"] != found[1]["stages.0.lora_start"]
