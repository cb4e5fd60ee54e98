"""Tiny decoders: what the loss is, that a run learns, resumes bit for bit and writes what draws."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from twostep.cli import app
from twostep.distill.decoder import DecoderRecipe, distil_decoder
from twostep.distill.decoder.method import DecodedPair, DecoderDistillation
from twostep.distill.decoder.plan import advise_decoder, plan_decoder
from twostep.distill.decoder.recipe import is_decoder_recipe
from twostep.distill.decoder.run import DIFFUSERS_FOLDER
from twostep.distill.pairs import Batches
from twostep.formats.header import read_header
from twostep.formats.tiny_decoder import DECODER_FILE, DecoderNote, find_decoder
from twostep.media.patches import edge_loss, psnr, random_crop
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.tiny_decoder import load_decoder
from twostep.training.loop import Randomness
from twostep.training.recipe import RecipeError, find_recipe, load_recipe
from twostep.training.run_folder import RunError, RunFolder

from .conftest import Handful

SMALL = {
    "width": 8,
    "blocks": [1, 0, 0],
    "iterations": 4,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_iterations": 1,
    "precision": "fp32",
    "checkpoint_every": 2,
    "log_every": 1,
    "jitter": 0.1,
    "crop": 8,
    "adversarial_weight": 0.1,
    "adversarial_from": 1,
    "discriminator_width": 8,
}


def recipe(**decoder: object) -> DecoderRecipe:
    return DecoderRecipe.model_validate({"num_samples": 2, "decoder": {**SMALL, **decoder}})


def run(settings: DecoderRecipe, teacher: Bundle, source: object, out: Path, **more: object):
    folder = RunFolder(out, settings)
    return distil_decoder(
        settings, teacher, source, folder, version="0", recipe_name="small", **more
    )


def test_edges_are_differences_of_neighbours_and_psnr_is_that_of_a_known_error() -> None:
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)
    # One apart in every row, nothing in every column.
    assert edge_loss(ramp).item() == pytest.approx(1.0)
    pictures = torch.zeros(2, 3, 8, 8)
    assert psnr(pictures, pictures + 0.2).item() == pytest.approx(10 * math.log10(4 / 0.04))


def test_a_crop_of_what_is_not_square_lies_inside_of_it() -> None:
    places = torch.arange(6.0 * 11).view(1, 1, 6, 11)
    for seed in range(8):
        piece = random_crop(places, 4, torch.Generator().manual_seed(seed))
        top, left = divmod(int(piece[0, 0, 0, 0]), 11)
        assert torch.equal(piece, places[..., top : top + 4, left : left + 4])
        assert piece.shape[-2:] == (4, 4)


def test_the_pair_is_the_autoencoders_own_decoding_of_the_same_latents(
    teacher: Bundle, source: Handful
) -> None:
    codec = teacher.codec
    method = DecoderDistillation(recipe(jitter=0.0).decoder)
    seen: list[torch.Tensor] = []

    def student(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return torch.zeros(len(inputs), 3, 32, 32)

    batches = Batches(source, 2, torch.device("cpu"))
    models = {"teacher": codec, "student": student}
    pair = method.draw(3, batches, models, Randomness.at(0, 3))
    # nano's autoencoder has a scaling factor of 1.
    assert torch.equal(pair.full, codec.decode(seen[0]))
    assert pair.is_judged and not method.draw(0, batches, models, Randomness.at(0, 0)).is_judged


def test_the_loss_is_pixels_and_edges_and_the_verdict_by_their_weights() -> None:
    method = DecoderDistillation(recipe(edge_weight=0.5, adversarial_weight=0.25).decoder)
    full = torch.zeros(1, 3, 4, 4)
    tiny = 0.1 * torch.arange(4.0).expand(1, 3, 4, 4)
    models = {"discriminator": lambda pictures: torch.full((len(pictures), 1), 2.0)}
    plain = method.loss("student", DecodedPair(full, tiny), models)
    assert plain["total"].item() == pytest.approx(0.15 + 0.5 * 0.1)
    judged = method.loss("student", DecodedPair(full, tiny, is_judged=True), models)
    verdict = math.log1p(math.exp(-2))
    assert judged["total"].item() == pytest.approx(0.2 + 0.25 * verdict)
    told = method.loss("discriminator", DecodedPair(full, tiny, is_judged=True), models)
    assert told["total"].item() == pytest.approx(verdict + math.log1p(math.exp(2)))


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_what_it_writes_is_loaded_and_drawn_with(
    teacher: Bundle, source: Handful, tmp_path: Path
) -> None:
    settings = recipe()
    whole = run(settings, teacher, source, tmp_path / "whole")

    class Died(Exception):
        pass

    def die(stage: object, iteration: int, figures: object) -> None:
        if iteration == 3:
            raise Died

    with pytest.raises(Died):
        run(settings, teacher, source, tmp_path / "cut", on_iteration=die)
    resumed = run(settings, teacher, source, tmp_path / "cut")
    assert resumed[0].read_bytes() == whole[0].read_bytes()
    # Once more: it is finished, and the same is written again.
    assert run(settings, teacher, source, tmp_path / "cut")[0].read_bytes() == whole[0].read_bytes()

    assert [path.name for path in whole] == [DECODER_FILE, DIFFUSERS_FOLDER]
    note = DecoderNote.of_header(read_header(whole[0]))
    assert note is not None and (note.base, note.recipe) == ("random", "small")
    sheet = Image.open(tmp_path / "whole" / "samples" / "decoder-000004.png")
    assert sheet.height == 2 * 2 * (64 + 4)
    tiny = load_decoder(find_decoder(str(whole[0])))
    assert tiny.network(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 16, 16)


@pytest.mark.slow
def test_it_learns_what_the_autoencoder_shows(
    teacher: Bundle, source: Handful, tmp_path: Path
) -> None:
    """Sixteen latents by heart, without a discriminator: ten dB nearer than at the beginning."""
    settings = recipe(
        width=16, blocks=[1, 1, 0], iterations=150, batch_size=8, learning_rate=3e-3,
        checkpoint_every=150, adversarial_weight=0.0, jitter=0.0, ema_decay=0.9,
    )  # fmt: skip
    seen: list[float] = []
    nano = load_bundle("nano")
    run(
        settings, nano, source, tmp_path,
        on_iteration=lambda stage, i, figures: seen.append(figures["psnr"]),
    )  # fmt: skip
    assert sum(seen[-5:]) / 5 > seen[0] + 10


def test_the_discriminator_comes_in_when_it_is_told_to_and_only_if_it_counts(
    teacher: Bundle,
) -> None:
    method = DecoderDistillation(recipe().decoder)
    student = nn.Conv2d(4, 3, 1)
    roles = method.roles(teacher.codec, student)
    assert set(roles) == {"student", "discriminator"}
    alone = DecoderDistillation(recipe(adversarial_weight=0).decoder)
    assert set(alone.roles(teacher.codec, student)) == {"student"}
    assert method.turns(0) == ("student",)
    assert method.turns(1) == ("discriminator", "student")


def test_a_decoder_of_other_resolutions_is_refused_with_the_right_number(teacher: Bundle) -> None:
    stage = recipe(blocks=[3, 3, 3, 1]).decoder
    with pytest.raises(RecipeError, match=r"8 pixels a side.*random has 4: give 3 numbers"):
        stage.layout(teacher.codec, "random")
    assert recipe().decoder.layout(teacher.codec, "random").latent_channels == 4


def test_a_piece_larger_than_the_latents_is_refused(teacher: Bundle, source: Handful) -> None:
    method = DecoderDistillation(recipe(crop=17).decoder)
    batches = Batches(source, 2, torch.device("cpu"))
    with pytest.raises(RecipeError, match=r"crop is 17.*latents of 16x16"):
        method.draw(0, batches, {"teacher": teacher.codec}, Randomness.at(0, 0))


@pytest.mark.slow
def test_a_replaced_model_is_refused(teacher: Bundle, source: Handful, tmp_path: Path) -> None:
    run(recipe(iterations=2), teacher, source, tmp_path)
    with pytest.raises(RunError, match=r"What model names has been replaced"):
        run(recipe(iterations=2), load_bundle("nano"), source, tmp_path)


def test_recipes_of_decoders_are_known_by_their_table_and_their_mistakes_told(
    tmp_path: Path,
) -> None:
    for name in ("nano-decoder", "sdxl-decoder"):
        assert is_decoder_recipe(find_recipe(name))
        assert load_recipe(name, DecoderRecipe).decoder.name == "decoder"
    assert not is_decoder_recipe(find_recipe("nano"))
    with pytest.raises(RecipeError, match=r"decoder.widht: no such key. Did you mean 'width'"):
        load_recipe("nano-decoder", DecoderRecipe, ["decoder.widht=8"])
    with pytest.raises(RecipeError, match=r"accumulate 3 does not divide batch_size 16"):
        load_recipe("nano-decoder", DecoderRecipe, ["decoder.accumulate=3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a recipe, or --decoder MODEL"),
        (["nano-quick", "--decoder", "nano"], "nano-quick is no recipe of a decoder"),
        (["--decoder", "nowhere-at-all"], "nowhere-at-all does not exist"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    out = ["--out", str(tmp_path / "run")]
    answer = CliRunner().invoke(app, ["distill", *arguments, *out])
    assert answer.exit_code != 0
    assert message in " ".join(answer.stderr.replace("│", " ").split())


@pytest.mark.slow
def test_a_plan_counts_the_decoder_and_the_discriminator() -> None:
    settings = load_recipe("nano-decoder", DecoderRecipe)
    planned = plan_decoder(settings)
    (stage,) = planned.stages
    layout = settings.decoder.layout(load_bundle("nano").codec, "nano")
    assert stage.trained["student"] == sum(map(math.prod, layout.shapes.values()))
    assert stage.peak > stage.checkpoint > 0
    changes = [change for change, _ in advise_decoder(settings)]
    assert {"batch_size": settings.decoder.batch_size // 2} in changes
    half = replace(planned).stages[0].peak
    assert min(peak for _, peak in advise_decoder(settings)) < half


@pytest.mark.slow
def test_distil_by_the_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = [f"decoder.{key}={value}" for key, value in SMALL.items()]
    options = [part for each in (*small, "data_options.variants=1") for part in ("-o", each)]
    answer = CliRunner().invoke(app, ["distill", "--decoder", "nano", "--out", str(out), *options])
    assert answer.exit_code == 0, answer.output
    assert f"written: {out / 'model' / DECODER_FILE}" in answer.stdout
