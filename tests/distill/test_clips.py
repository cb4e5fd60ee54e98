"""A motion module is distilled by the same trainer, and nothing in that knows of clips."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import twostep
from twostep.distill import DistillRecipe, distil
from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.pairs import Batches, draw_teacher_step, student_landing
from twostep.distill.plan import plan
from twostep.distill.trainer import StageTrainer
from twostep.formats.motion_files import MotionConfig
from twostep.models.loading import load_bundle
from twostep.models.motion import load_pictures, motion_contract, with_motion
from twostep.models.saving import save_bundle
from twostep.networks.adapters import add_lora, remove_loras
from twostep.networks.backbone import BackboneError
from twostep.networks.motion import MotionModule
from twostep.pretrain.clips import moving_drawings
from twostep.pretrain.model import random_bundle
from twostep.pretrain.sizes import NANO
from twostep.training.loop import Randomness
from twostep.training.run_folder import RunFolder

SIZE = replace(
    NANO,
    pixels=16,
    vae_channels=(8, 8, 8),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    unet_channels=(16, 32),
    unet_heads=(2, 2),
    transformer_layers=(1, 1),
    norm_groups=8,
    text_widths=(16, 16),
    text_heads=2,
    text_layers=(2, 2),
)
SHAPE = MotionConfig(channels=(16, 32), layers=1, heads=2, groups=8, max_frames=8)
FRAMES = 4
STAGE = {
    "student_steps": 4,
    "teacher_steps": 8,
    "iterations": 2,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "checkpoint_every": 2,
    "log_every": 1,
}
MEDIA = re.compile(r"\.(video|clips|motions?|motion_files|tracking)$")
ADVERSARIAL = {"name": "adversarial", "objective": "conditional", "r1_weight": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a teacher of clips on two tiny picture models, all with random weights."""
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        bundle = random_bundle(seed, size=SIZE)
        save_bundle(replace(bundle, contract=replace(bundle.contract, name=name)), place / name)
    pictures = load_pictures([str(place / "first"), str(place / "second")])
    torch.manual_seed(5)
    network = MotionModule(SHAPE)
    for name, parameter in network.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    contract = motion_contract(pictures[0].contract, "clips", recipe="none", version="0")
    save_bundle(with_motion(pictures, network, contract, frames=FRAMES), place / "clips")
    return place / "clips"


def recipe(folder, *stages, **others) -> DistillRecipe:
    settings = {"model": str(folder), "release": [4], **others}
    settings |= {"sample_prompts": ["a fox"], "device": "cpu", "stages": list(stages)}
    return DistillRecipe.model_validate(settings)


class SameClips:
    """The same two clips in every call, each for the picture model that is said."""

    def __init__(self, bundle, variants) -> None:
        self.bundle = bundle
        self.variants = variants

    def draw(self, count, tensors, words):
        generator = torch.Generator().manual_seed(1)
        x0 = torch.randn(2, 4, FRAMES, 4, 4, generator=generator)
        conditioning = self.bundle.conditioning(["a fox", "a bird"], 16, 16)
        return x0, replace(conditioning, variants=self.variants)

    def empty(self, like):
        return like


def gradient(bundle, variants) -> list[torch.Tensor]:
    """Return the gradient of one regression step on the same two clips."""
    student = bundle.denoiser.standalone()
    # Apart from its teacher, or there is nothing to learn.
    for parameter in student.network.parameters():
        parameter.data *= 1.1
    student.network.requires_grad_(True)
    taken = draw_teacher_step(
        Batches(SameClips(bundle, variants), 2, torch.device("cpu")),
        bundle.denoiser,
        Randomness.at(0, 0),
        drawn_steps=4,
        student_steps=4,
        teacher_steps=8,
        guidance=1.0,
    )
    landed = student_landing(student, taken)
    (landed - taken.x_s).square().flatten(1).mean(dim=1).mean().backward()
    return [parameter.grad for parameter in student.network.parameters()]


def test_gradients_are_averaged_over_the_picture_models(folder) -> None:
    """Of a batch for both, they are the mean of what each item gives on its own model."""
    bundle = load_bundle(folder)
    mixed = gradient(bundle, (0, 1))
    first = gradient(bundle, (0, 0))
    second = gradient(bundle, (1, 1))
    crossed = gradient(bundle, (1, 0))
    pairs = zip(mixed, crossed, first, second, strict=True)
    for one, other, of_first, of_second in pairs:
        # The items of both mixed batches together are those of both pure ones.
        assert torch.allclose(one + other, of_first + of_second, rtol=1e-3, atol=1e-7)
    differences = [(a - b).abs().max() for a, b in zip(first, second, strict=True)]
    assert max(differences) > 1e-5


def test_discriminator_judges_along_time_and_knows_the_model(folder) -> None:
    teacher = load_bundle(folder).denoiser
    torch.manual_seed(0)
    judge = Discriminator(teacher, conditional=False, levels="all")
    halvings = [head[0][0] for head in judge.heads]
    assert all(isinstance(layer, torch.nn.Conv3d) for layer in halvings)
    assert {layer.kernel_size for layer in halvings} == {(4, 4, 4)}
    conditioning = load_bundle(folder).conditioning(["a fox", "a fox"], 16, 16)
    conditioning = replace(conditioning, variants=(0, 1))
    x = torch.randn(1, 4, FRAMES, 4, 4).expand(2, -1, -1, -1, -1)
    times = torch.tensor([500, 500])
    with torch.no_grad():
        same = judge.judge(None, judge.features(x, times, conditioning))
        judge.encoder.variants.weight[1] += 0.5
        apart = judge.judge(None, judge.features(x, times, conditioning))
        shuffled = judge.features(x[:, :, [2, 0, 3, 1]], times, conditioning)
        reordered = judge.judge(None, shuffled)
    assert same[0] == pytest.approx(same[1].item(), abs=1e-6)
    assert apart[0] == same[0] and abs(apart[1] - same[1]) > 1e-4
    # The order of frames counts, so it is no judge of pictures.
    assert abs(reordered[0] - same[0]) > 1e-5
    names = {name for name, _ in judge.named_parameters()}
    assert "encoder.variants.weight" in names and "encoder.base.conv_in.weight" in names
    assert not any("up_blocks" in name for name in names)


@pytest.mark.parametrize("method", [{"name": "regression"}, ADVERSARIAL])
def test_motion_module_alone_learns(folder, tmp_path, method) -> None:
    teacher = load_bundle(folder)
    stage = recipe(folder, {**STAGE, "method": method}).stages[0]
    student = teacher.denoiser.standalone()
    student.network.requires_grad_(True)
    source = moving_drawings(teacher, tmp_path, lambda done, total, words: None)
    pictures = torch.nn.ModuleList(student.backbone.bases)
    before = [parameter.clone() for parameter in pictures.parameters()]
    start = {name: value.clone() for name, value in student.network.state_dict().items()}
    trainer = StageTrainer(stage, source, teacher.denoiser, student)
    figures = trainer.iterate(0, Randomness.at(0, 0))
    assert figures["student_grad_norm"] > 0
    kept = zip(before, pictures.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)
    ended = student.network.state_dict()
    moved = [name for name, value in ended.items() if not torch.equal(start[name], value)]
    assert len(moved) > 0.9 * len(ended)
    assert sum(p.numel() for p in trainer.roles["student"].weights.parameters()) == sum(
        value.numel() for value in start.values()
    )


@pytest.mark.parametrize("method", [{"name": "regression"}, ADVERSARIAL])
def test_a_lora_on_the_module_learns_alone(folder, tmp_path, method) -> None:
    teacher = load_bundle(folder)
    stage = recipe(folder, {**STAGE, "lora_rank": 2, "method": method}).stages[0]
    network = teacher.denoiser.network
    start = {name: value.clone() for name, value in network.state_dict().items()}
    lora = add_lora(network, "fast", rank=2, targets=teacher.denoiser.backbone.spec.lora_targets)
    student = replace(teacher.denoiser, lora="fast")
    source = moving_drawings(teacher, tmp_path, lambda done, total, words: None)
    trainer = StageTrainer(stage, source, teacher.denoiser, student)
    assert trainer.iterate(0, Randomness.at(0, 0))["student_grad_norm"] > 0
    ups = [value for name, value in lora.state_dict().items() if "lora_B" in name]
    assert all(value.abs().max() > 0 for value in ups)
    remove_loras(network)
    ended = network.state_dict()
    assert all(torch.equal(start[name], value) for name, value in ended.items())


@pytest.mark.slow
def test_chain_ends_in_loras_that_draw(folder, tmp_path) -> None:
    shared = {**STAGE, "lora_rank": 2, "method": {"name": "regression"}}
    stages = [shared, {**shared, "student_steps": 2, "teacher_steps": 4}]
    settings = recipe(folder, *stages, release=[4, 2])
    teacher = load_bundle(folder)
    run = RunFolder(tmp_path / "run", settings)
    source = moving_drawings(teacher, tmp_path, lambda done, total, words: None)
    written = distil(settings, teacher, source, run, version="0", recipe_name="test")
    assert {path.name for path in written.values()} == {
        "clips_4step_lora.safetensors",
        "clips_2step_lora.safetensors",
    }
    from twostep import Request, Studio

    model = str(tmp_path / "run" / "model")
    for steps, path in written.items():
        request = Request("a fox", model=model, loras=(str(path),), steps=steps)
        (clip,) = Studio(device="cpu").draw(request).images
        assert len(clip) == FRAMES and clip.size == (16, 16)


def test_heads_on_pictures_are_refused(folder) -> None:
    teacher = load_bundle(folder).denoiser
    method = {"name": "ladd"}
    stage = recipe(folder, {**STAGE, "teacher_steps": None, "method": method}).stages[0]
    with pytest.raises(BackboneError, match=r"motion have 3 sides.*adversarial"):
        stage.make_method().roles(teacher, teacher.standalone())


@pytest.mark.slow
def test_chain_ends_in_students_that_draw(folder, tmp_path) -> None:
    fewer = {**STAGE, "student_steps": 2, "teacher_steps": 4}
    stages = [
        {**STAGE, "method": {"name": "regression"}, "guidance": 3.0},
        {**STAGE, "method": ADVERSARIAL},
        {**fewer, "method": {"name": "regression"}},
        {**fewer, "method": ADVERSARIAL},
    ]
    settings = recipe(folder, *stages, release=[4, 2])
    teacher = load_bundle(folder)
    run = RunFolder(tmp_path / "run", settings)
    source = moving_drawings(teacher, tmp_path, lambda done, total, words: None)
    written = distil(settings, teacher, source, run, version="0", recipe_name="test")
    assert set(written) == {4, 2}
    model = tmp_path / "run" / "model"
    first = load_bundle(model).denoiser.network.state_dict()
    for steps in (4, 2):
        student = load_bundle(model, steps=steps)
        assert student.contract.steps == steps and student.contract.media == "video"
        assert len(student.denoiser.backbone.bases) == 2
        changed = student.denoiser.network.state_dict()
        assert any(not torch.equal(first[name], changed[name]) for name in first)
    from twostep import Request, Studio

    (clip,) = Studio(device="cpu").draw(Request("a fox", model=str(model), steps=2)).images
    assert len(clip) == FRAMES and clip.size == (16, 16)
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    # The same command again finds everything done.
    again = distil(settings, load_bundle(folder), source, run, version="0", recipe_name="test")
    assert again == written


@pytest.mark.slow
def test_regression_brings_the_student_to_the_teacher(folder, tmp_path) -> None:
    """The student's error, from a fresh module, falls to less than half."""
    teacher = load_bundle(folder)
    settings = {"iterations": 200, "learning_rate": 3e-3, "batch_size": 4}
    method = {"name": "regression"}
    stage = recipe(folder, {**STAGE, **settings, "method": method}).stages[0]
    backbone = teacher.denoiser.backbone
    torch.manual_seed(1)
    fresh = MotionModule(SHAPE).requires_grad_(True)
    student = replace(teacher.denoiser, backbone=replace(backbone, network=fresh))
    source = moving_drawings(teacher, tmp_path, lambda done, total, words: None)
    trainer = StageTrainer(stage, source, teacher.denoiser, student)
    losses = [trainer.iterate(i, Randomness.at(0, i))["student_loss"] for i in range(120)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_plan_counts_the_module_and_not_the_pictures(folder) -> None:
    planned = plan(recipe(folder, {**STAGE, "method": ADVERSARIAL}))
    count = sum(p.numel() for p in MotionModule(SHAPE).parameters())
    assert planned.stages[0].trained["student"] == count
    judge = planned.stages[0].trained["discriminator"]
    # A picture UNet's way down and middle too, and the heads.
    assert judge > count


def test_nothing_that_trains_knows_of_clips() -> None:
    """Trainer, chain, plan, health and methods import no medium, and name nothing of this one."""
    root = Path(twostep.__file__).parent
    sources = [*(root / "distill").rglob("*.py"), *(root / "training").rglob("*.py")]
    assert len(sources) > 40
    for path in sources:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        } | {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        media = [name for name in imported if MEDIA.search(name)]
        assert not media, f"{path.name} imports {media}"
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        known = {name for name in names if re.search("video|motion|num_frames", name, re.I)}
        assert not known, f"{path.name} names {known}"
