"""A run that distils a tiny decoder: trained, shown beside the autoencoder, and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from twostep.data.cache import fingerprint_of
from twostep.diffusion.shapes import Batch
from twostep.distill.beginning import begin_run
from twostep.distill.decoder.recipe import DecoderRecipe, DecoderStage
from twostep.distill.health import measure
from twostep.distill.pairs import Batches, Fingerprinted, Source
from twostep.distill.samples import sheet_of, sheets_in
from twostep.distill.trainer import train_stage
from twostep.formats.locate import ModelError
from twostep.formats.tiny_decoder import DECODER_FILE, DecoderNote, TinyLayout
from twostep.media.codec import TinyDecoder
from twostep.media.image import ImageCodec
from twostep.media.patches import psnr
from twostep.models.bundle import Bundle, modules_of
from twostep.models.tiny_decoder import build_decoder, write_decoder, write_for_diffusers
from twostep.training.loop import Randomness, hashed_seed
from twostep.training.processes import wait, world
from twostep.training.run_folder import FINISHED, RunFolder

DIFFUSERS_FOLDER = "tiny_decoder"
"""The folder with the decoder as diffusers has it, beside `DECODER_FILE`."""

_NUM_JUDGED = 64
"""Latents on which the finished decoder is compared with the autoencoder."""

_AT_ONCE = 8

_SAMPLES, _JUDGED = "samples", "judged"
"""What randomness is for, beside that of iterations."""

OnDecoder = Callable[[DecoderStage, int, dict[str, float]], None]
"""Called after every iteration with the stage, the iterations done, and the figures."""


def distil_decoder(
    recipe: DecoderRecipe,
    teacher: Bundle,
    source: Source,
    folder: RunFolder,
    *,
    version: str,
    recipe_name: str,
    accept_replaced: bool = False,
    on_iteration: OnDecoder = lambda stage, iteration, figures: None,
) -> list[Path]:
    """Train a tiny decoder, and return what was written: its file, and the folder for diffusers.

    The same call with the same folder resumes.

    Args:
        recipe: what to do.
        teacher: the model, of which only the autoencoder is used; that is moved to the device.
        source: of latents.
        folder: takes checkpoints, log, samples and the decoder.
        version: of this package, for the decoder's note and the log.
        recipe_name: for the note.
        accept_replaced: whether to go on where model or data were replaced since the run began.
        on_iteration: called after every iteration.

    Raises:
        ModelError: the model does not make pictures.
        RecipeError: decoder and latents do not fit together.
        TrainingError: a loss is no finite number, or health asks for a pause.
        StoppedError: training was asked to stop.
        RunError: the folder cannot be written or holds something else, or model or data were
            replaced.
    """
    stage = recipe.decoder
    codec = codec_of(teacher)
    layout = stage.layout(codec, teacher.contract.base)
    contents = {"model": fingerprint_of(modules_of(codec))}
    if isinstance(source, Fingerprinted):
        contents["data"] = source.fingerprint()
    folder.compare_contents(contents, accept=accept_replaced)
    device = begin_run(recipe, folder, version=version)
    for network in modules_of(codec):
        nn.Module.to(network, device)  # diffusers' own method would warn of nothing
    network = fresh_decoder(layout, stage).to(device)
    _train_or_load(recipe, codec, network, source, folder, on_iteration=on_iteration)
    network.eval().requires_grad_(False)
    trained = TrainedDecoder(codec, network)
    latents = draw_latents(source, _NUM_JUDGED, stage, _JUDGED)
    near = psnr(trained.tiny(latents), trained.full(latents)).item()
    note = DecoderNote.of_contract(
        teacher.contract, recipe=recipe_name, version=version, psnr=round(near, 2)
    )
    model = folder.path / "model"
    if world().is_first:
        folder.log(part=stage.name, psnr_at_the_end=near, latents=_NUM_JUDGED)
        model.mkdir(exist_ok=True)
        write_decoder(network, note.to_metadata(), model / DECODER_FILE)
        write_for_diffusers(
            network, layout, codec.vae, note.to_metadata(), model / DIFFUSERS_FOLDER
        )
    return [model / DECODER_FILE, model / DIFFUSERS_FOLDER]


def codec_of(teacher: Bundle) -> ImageCodec:
    """Return a model's codec of pictures; ModelError if it makes something else."""
    if not isinstance(teacher.codec, ImageCodec):
        raise ModelError(
            f"{teacher.contract.name} makes {teacher.codec.media}, and tiny decoders are of "
            "pictures. Give a model of pictures."
        )
    return teacher.codec


def fresh_decoder(layout: TinyLayout, stage: DecoderStage) -> nn.Module:
    """Return a decoder that is to be trained, its random weights those of the stage's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(stage.seed, stage.name, "weights"))
        network: nn.Module = build_decoder(layout)
    return network.train()


def draw_latents(source: Source, count: int, stage: DecoderStage, use: str) -> Batch:
    """Return latents for a use beside training, the same in every process and on every resume."""
    batches = Batches(source, count, torch.device("cpu"))
    return batches.latents(Randomness.at(stage.seed, 0, use))


@dataclass(frozen=True, eq=False)
class TrainedDecoder:
    """A decoder beside the autoencoder that it learns from.

    Args:
        codec: of the autoencoder.
        network: the decoder.
    """

    codec: ImageCodec
    network: nn.Module

    def full(self, latents: Batch) -> Tensor:
        """Return the autoencoder's pictures, in -1..1, on the CPU."""
        return self._in_parts(latents, self.codec.decode)

    def tiny(self, latents: Batch) -> Tensor:
        """Return the decoder's pictures, in -1..1, on the CPU."""
        tiny = TinyDecoder(self.network)
        codec = ImageCodec(self.codec.vae, self.codec.deviation, tiny, decoder="in training")
        return self._in_parts(latents, codec.decode)

    def show(self, latents: Batch, full: Tensor) -> tuple[Image.Image, dict[str, float]]:
        """Return a sheet of both decoders' pictures, and how their looks compare.

        Args:
            latents: what is decoded.
            full: the autoencoder's pictures of it.
        """
        tiny = self.tiny(latents)
        sheet = sheet_of(("full", "tiny"), torch.stack([full, tiny]))
        # Each is a seed of its own, as it were: they must differ as those of the autoencoder do.
        looks = measure(tiny[:, None], full[:, None])
        return sheet, {**looks, "sample_psnr": psnr(tiny, full).item()}

    def _in_parts(self, latents: Batch, decode: Callable[[Batch], Tensor]) -> Tensor:
        device = next(self.network.parameters()).device
        parts = [decode(part.to(device)).float().cpu() for part in latents.split(_AT_ONCE)]
        return torch.cat(parts)


def _train_or_load(
    recipe: DecoderRecipe,
    codec: ImageCodec,
    network: nn.Module,
    source: Source,
    folder: RunFolder,
    *,
    on_iteration: OnDecoder,
) -> None:
    """Train the decoder, or take over its weights if the run has finished before."""
    stage = recipe.decoder
    finished = folder.load(f"{stage.name}{FINISHED}")
    # So that no process finds what another one has just finished.
    wait()
    if finished is not None:
        network.load_state_dict(finished["weights"])
        folder.delete(stage.name)
        return
    beside = TrainedDecoder(codec, network)
    latents = draw_latents(source, recipe.num_samples, stage, _SAMPLES)
    examples: Sequence[tuple[Batch, Tensor]] = [(latents, beside.full(latents))]
    sheets, samples = sheets_in(folder, stage, examples, draw=lambda each: beside.show(*each))
    train_stage(
        stage,
        source,
        teacher=codec,
        student=network,
        folder=folder,
        health=recipe.health,
        periodic=(samples,),
        on_iteration=lambda iteration, figures: on_iteration(stage, iteration, figures),
        on_checkpoint=sheets.examine,
    )
    folder.save(f"{stage.name}{FINISHED}", {"weights": network.state_dict()})
    wait()
    folder.delete(stage.name)
