"""What mini adds: scenes that stay on the device, a teacher that learns with its text encoders, and
recipes that make all of it, at a small size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from twostep.diffusion import shapes
from twostep.evaluate.attributes import BACKGROUNDS
from twostep.formats.folders import weights_folder
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.sdxl import text_encoders
from twostep.pretrain import encoded_scenes, joint
from twostep.pretrain.control import SceneExamples, scene_silhouettes
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.encoded_scenes import (
    EncodedScenes,
    caption_scenes,
    make_encoded_scenes,
    scenes,
)
from twostep.pretrain.joint import JointSettings, Loss, train_joint
from twostep.pretrain.model import build_unet, build_vae, random_bundle
from twostep.pretrain.parts import load_part
from twostep.pretrain.scene_captions import scene_corpus
from twostep.pretrain.scenes import Box, PlacedThing, Scene, compose, random_scenes, table_of
from twostep.pretrain.sizes import MINI, SIZES
from twostep.pretrain.vae import ComposedScenes
from twostep.training.loop import Randomness
from twostep.training.recipe import find_recipe
from twostep.training.run_folder import RunFolder

from .conftest import tiny_loop

SMALL = replace(
    MINI,
    pixels=32,
    vae_channels=(8, 8, 8, 8),
    encoder_blocks=(1, 1, 1, 1),
    decoder_blocks=(1, 1, 1, 1),
    unet_channels=(16, 32),
    unet_heads=(1, 2),
    transformer_layers=(1, 1),
    norm_groups=8,
    text_widths=(16, 24),
    text_layers=(1, 1),
    text_heads=2,
    time_id_width=8,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(emoji: DrawingSet) -> Iterator[None]:
    """The recipes of mini make a model that is much smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "mini", SMALL)
        yield


@pytest.fixture(scope="module")
def teacher(emoji: DrawingSet) -> Bundle:
    return random_bundle(corpus=scene_corpus(emoji.concepts), size=SMALL)


@pytest.fixture(scope="module")
def encoded(emoji: DrawingSet, teacher: Bundle) -> EncodedScenes:
    return make_encoded_scenes(
        emoji,
        teacher.codec,
        text_encoders(teacher).tokenizers[0],
        pixels=32,
        count=24,
        captions=2,
        seed=3,
        device=CPU,
    )


def test_mini_is_as_large_as_it_says() -> None:
    with torch.device("meta"):
        unet = build_unet(MINI)
    assert round(sum(weight.numel() for weight in unet.parameters()) / 1e6, 1) == 19.2
    assert MINI.latent_pixels == 32


def test_encoded_scenes_are_the_latents_of_composed_ones(
    emoji: DrawingSet, teacher: Bundle, encoded: EncodedScenes
) -> None:
    x0, tokens = encoded.draw(5, torch.Generator().manual_seed(0))
    rows = torch.randint(24, (5,), generator=torch.Generator().manual_seed(0))
    table = random_scenes(len(emoji.concepts), 4, count=24, seed=3).rows(rows)
    expected = teacher.codec.encode(compose(table, emoji.drawings, 32))
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3)
    tokenizer = text_encoders(teacher).tokenizers[0]
    names = [name for concept in emoji.concepts for name in (*concept.names, concept.subgroup)]
    for words in tokenizer.batch_decode(tokens, skip_special_tokens=True):
        assert words == "" or any(name in words for name in names), words


def test_a_source_draws_what_its_text_encoders_say(teacher: Bundle, emoji: DrawingSet) -> None:
    source = replace(
        scenes(teacher, Path("unused"), lambda *_: None, count=12, captions=1),
        drawings=lambda: emoji,
    )
    x0, conditioning = source.draw(4, torch.Generator().manual_seed(1), Random(0))
    assert x0.shape == (4, 4, 4, 4)
    tokens = source._encoded.draw(4, torch.Generator().manual_seed(1))[1]
    tokenizer = text_encoders(teacher).tokenizers[0]
    words = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    expected = teacher.conditioning(words, 32, 32)
    torch.testing.assert_close(conditioning.text, expected.text)
    torch.testing.assert_close(conditioning.pooled, expected.pooled)
    assert torch.equal(conditioning.sizes, expected.sizes)
    torch.testing.assert_close(
        source.empty(conditioning).text[2:3], teacher.conditioning([""], 32, 32).text
    )


@pytest.mark.slow
def test_captions_do_not_depend_on_how_many_processes_write_them(
    emoji: DrawingSet, teacher: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded_scenes, "_CAPTIONED_AT_ONCE", 8)
    table = random_scenes(len(emoji.concepts), 4, count=30, seed=0)
    tokenizer = text_encoders(teacher).tokenizers[0]

    def written(num_cores: int) -> torch.Tensor:
        monkeypatch.setattr(encoded_scenes, "num_cores", lambda: num_cores)
        return caption_scenes(table, emoji.concepts, tokenizer, captions=2, seed=0)

    assert torch.equal(written(1), written(3))


def joint_settings(**loop: Any) -> JointSettings:
    return JointSettings.model_validate({"size": "mini", "loop": tiny_loop(**loop)})


def run_joint(
    folder: Path,
    scenes: EncodedScenes,
    emoji: DrawingSet,
    hear: Callable[[int, dict[str, float]], None] = lambda iteration, figures: None,
    **loop: Any,
) -> dict[str, torch.Tensor]:
    settings = joint_settings(**loop)
    teacher = random_bundle(1, corpus=scene_corpus(emoji.concepts), size=SMALL)
    train_joint(teacher, scenes, settings, RunFolder(folder, settings), on_iteration=hear)
    return nn.ModuleDict(teacher.parts).state_dict()


def test_a_joint_training_that_is_resumed_equals_an_uninterrupted_one(
    emoji: DrawingSet, encoded: EncodedScenes, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(iteration: int, figures: dict[str, float]) -> None:
        if iteration == 3:
            raise Killed

    whole = run_joint(tmp_path / "whole", encoded, emoji)
    with pytest.raises(Killed):
        run_joint(tmp_path / "cut", encoded, emoji, die)
    resumed = run_joint(tmp_path / "cut", encoded, emoji)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    before = nn.ModuleDict(
        random_bundle(1, corpus=scene_corpus(emoji.concepts), size=SMALL).parts
    ).state_dict()
    trained = {key.split(".")[0] for key, value in whole.items() if (value != before[key]).any()}
    assert trained == {"unet", "text_encoder", "text_encoder_2"}


def test_a_network_whose_weights_lie_channels_last_is_saved(
    small: None, emoji: DrawingSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`compile = true` lays them out so; here nothing is compiled, which takes long on a CPU."""
    monkeypatch.setattr(joint, "compile_blocks", lambda network, kinds: 0)
    with weights_folder(tmp_path / "autoencoder" / "vae") as folder:
        build_vae(SMALL).save_pretrained(folder)
    quick = ["loop.iterations=1", "loop.batch_size=2", "scenes=4", "captions=1"]
    part = load_part(
        "mini-teacher",
        [
            "device=cpu",
            *quick,
            f'autoencoder="{tmp_path / "autoencoder"}"',
            'sample_prompts=["a fox"]',
            "sample_seeds=[0]",
            "loop.ema_decay=0.0",
        ],
    )
    loaded = load_bundle(part.train(emoji, tmp_path / "run"))
    assert loaded.contract.recipe == "mini-teacher"
    state = RunFolder(tmp_path / "run", part.settings).load("joint")
    assert state is not None
    weight = loaded.denoiser.network.state_dict()["down_blocks.0.resnets.0.conv1.weight"]
    trained = state["average"]["weights"]["unet.down_blocks.0.resnets.0.conv1.weight"]
    torch.testing.assert_close(weight, trained.half().float(), rtol=0, atol=0)


@pytest.mark.slow
def test_unet_and_text_encoders_learn_together(
    emoji: DrawingSet, encoded: EncodedScenes, tmp_path: Path
) -> None:
    losses: list[float] = []
    run_joint(
        tmp_path,
        encoded,
        emoji,
        lambda iteration, figures: losses.append(figures["loss"]),
        iterations=60,
        batch_size=16,
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


class Waits(TorchDispatchMode):
    """Collects copies to tensors without memory, which stand for a GPU, that are waited for.

    To read one of their values is an error by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            target = torch.device(kwargs.get("device") or args[0].device)
            if target.type != args[0].device.type:
                self.found.append(f"{args[0].device} -> {target}")
        return func(*args, **kwargs)


def test_an_iteration_does_not_wait_for_the_gpu(
    emoji: DrawingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Randomness, "on", lambda self, device: None)
    monkeypatch.setattr(shapes, "_QUEUEING", ("meta",))
    gpu = torch.device("meta")
    teacher = random_bundle(corpus=scene_corpus(emoji.concepts), size=SMALL).to(gpu)
    table = random_scenes(len(emoji.concepts), 4, count=8, seed=0).to(gpu)
    drawings = torch.zeros(len(emoji.concepts), 4, 4, 16, 16, dtype=torch.uint8, device=gpu)
    latents = torch.zeros(8, 4, 4, 4, dtype=torch.float16, device=gpu)
    tokens = torch.zeros(8, 2, SMALL.max_tokens, dtype=torch.int16, device=gpu)
    encoded = EncodedScenes(latents, tokens, table)
    nn.ModuleDict(teacher.parts).requires_grad_(True)
    loss = Loss(teacher, encoded, joint_settings())
    with Waits() as waits:
        value = loss(0, Randomness.at(0, 0))
        value.backward()
        assert value.device == gpu
        ComposedScenes(table, drawings, 32).draw(4, Randomness.at(0, 0))
        SceneExamples(encoded, drawings, teacher).draw(4, slice(0, 4), Randomness.at(0, 0))
        assert waits.found == []
        torch.zeros(2).to(gpu)
        assert len(waits.found) == 1


def test_a_silhouette_is_where_the_things_are() -> None:
    """A thing that fills its box hides the ground there, one of a third opacity does not."""
    drawings = torch.full((2, 1, 4, 16, 16), 255, dtype=torch.uint8)
    drawings[1, :, 3] = 85
    left = PlacedThing(0, 0, Box(0.0, 0.25, 0.5))
    right = PlacedThing(1, 0, Box(0.5, 0.25, 0.5))
    grounds = list(BACKGROUNDS)
    background = (grounds.index("red"), grounds.index("teal"))
    table = table_of(
        [Scene((left, right), "left of", background), Scene((left,), None, background)]
    )
    masks = scene_silhouettes(table, drawings, 32)
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    expected[8:24, :16] = 1
    assert torch.equal(masks, torch.stack([expected, expected]))


def test_every_recipe_of_mini_names_what_it_needs() -> None:
    for name in ("mini-vae", "mini-teacher", "mini-silhouette"):
        part = load_part(name)
        assert part.settings.size == "mini"
        assert part.settings.loop.limit_seconds is not None
    for name in ("mini", "mini-lora"):
        text = find_recipe(name).read_text()
        assert 'model = "runs/mini-teacher/model"' in text


def test_the_log_of_an_autoencoder_has_its_signal_to_noise(
    small: None, emoji: DrawingSet, tmp_path: Path
) -> None:
    quick = ["loop.iterations=2", "loop.batch_size=2", "loop.checkpoint_every=2", "crop_pixels=16"]
    part = load_part(
        "mini-vae", ["device=cpu", "compile=false", "num_pictures=8", *quick, "loop.log_every=1"]
    )
    model = part.train(emoji, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (psnr,) = [line["psnr"] for line in lines if "psnr" in line]
    assert 0 < psnr < 20
    assert (tmp_path / "samples" / "vae-000002.png").is_file()
    assert (model / "vae" / "config.json").is_file()
