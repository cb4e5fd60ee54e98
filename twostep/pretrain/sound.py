"""The teacher of the built-in model of sounds: a rectified flow on latents of rendered notes.

Its codec is fitted first, to notes that are rendered once. There is no text encoder to train: what
the words of captions mean, the network's first layer learns with the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twostep import __version__
from twostep.contract import Contract, RectifiedFlowSpec
from twostep.diffusion import RectifiedFlow
from twostep.diffusion.shapes import sent
from twostep.media.audio import AudioCodec, BlockComponents
from twostep.media.spectrogram import Spectrogram
from twostep.models.audio import FAMILY
from twostep.models.bundle import Bundle
from twostep.networks.audio_dit import AudioDit, AudioDitConfig
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.flow import draw_logit_normal_times, flow_loss
from twostep.pretrain.latents import LatentSource
from twostep.pretrain.loop import PartSettings, silent, train_network
from twostep.pretrain.notes import (
    find_notes,
    fitted_codec,
    note_prompts,
    random_labels,
    render_notes,
    sound_source,
)
from twostep.pretrain.progress import OnDone
from twostep.pretrain.sound_kinds import all_prompts, find_sounds, render_all
from twostep.pretrain.soundfont import NUM_SAMPLES, RATE
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.run_folder import RunFolder

_FITTING = -1
"""The iteration whose randomness draws the notes that the codec is fitted to."""


class SoundSettings(PartSettings):
    """The recipe of a teacher of sounds."""

    learns_from_drawings: ClassVar[bool] = False

    part: Literal["sound"] = "sound"
    name: str = Field("nano-audio", description="what the teacher is called")
    sounds: Literal["notes", "all"] = Field(
        "notes", description="what is rendered: notes, or chords and drum hits too, a third each"
    )
    notes: int = Field(6000, gt=0, description="sounds that are rendered and encoded once")
    soundfont: Path | None = Field(None, description="the file; that of the system if not given")
    bands: int = Field(128, gt=0, description="bands of the spectrograms")
    block_frames: int = Field(4, gt=0, description="frames of a spectrogram that are one token")
    components: int = Field(64, gt=0, description="components that are kept of a block")
    fitted_notes: int = Field(1500, gt=0, description="notes that the codec is fitted to")
    width: int = Field(192, gt=0, multiple_of=32, description="numbers of a token in the network")
    depth: int = Field(4, gt=0, description="blocks of the network")
    heads: int = Field(4, gt=0, description="attention heads")
    guidance: float = Field(2.0, ge=1, description="guidance scale that the teacher recommends")
    sampling_steps: int = Field(32, gt=0, description="steps that the teacher recommends")
    sample_prompts: tuple[str, ...] = Field(
        ("a low piano note, soft",), min_length=1, description="prompts of the sample sheets"
    )
    sample_seeds: tuple[int, ...] = Field((0, 1), min_length=1, description="seeds of each of them")


def new_sound_teacher(settings: SoundSettings, recipe: str) -> Bundle:
    """Return a teacher with random weights and a codec that is fitted to nothing yet."""
    prompts = all_prompts() if settings.sounds == "all" else note_prompts()
    codec = AudioCodec(
        BlockComponents(settings.bands, settings.block_frames, settings.components),
        Spectrogram(rate=RATE, bands=settings.bands),
    )
    config = AudioDitConfig(
        channels=settings.components,
        prompt_width=len(prompts.vocabulary),
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
    )
    contract = Contract(
        name=settings.name,
        role="teacher",
        steps=settings.sampling_steps,
        trained_times=(),
        prediction_type="flow",
        spacing="trailing",
        guidance=settings.guidance,
        sizes=((NUM_SAMPLES, 1),),
        base=settings.name,
        lora_rank=None,
        lora_alpha=None,
        recipe=recipe,
        version=__version__,
        family=FAMILY,
        media=codec.media,
        schedule=RectifiedFlowSpec(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)
        network = AudioDit(config)
    return Bundle(Denoiser(network, RectifiedFlow(), "flow"), codec, prompts, contract)


def fit_codec(teacher: Bundle, settings: SoundSettings, on_sound: OnDone) -> None:
    """Fit a teacher's codec to sounds of its own, in place."""
    assert isinstance(teacher.codec, AudioCodec)
    random = Randomness.at(settings.loop.seed, _FITTING)
    labels = random_labels(settings.fitted_notes, random.tensors)
    seed = random.words.getrandbits(31)
    soundfont = settings.soundfont
    if settings.sounds == "all":
        sounds, _, _ = render_all(
            settings.fitted_notes, seed, soundfont=soundfont, on_sound=on_sound
        )
    else:
        sounds = render_notes(labels, seed, soundfont=soundfont, on_sound=on_sound)
    fitted_codec(teacher.codec, sounds)


def sound_cache(settings: SoundSettings, folder: Path) -> Path:
    """Return where the sounds that a teacher learns from are kept in its run's folder."""
    return folder / ("sounds.safetensors" if settings.sounds == "all" else "notes.safetensors")


def find_source(
    teacher: Bundle, settings: SoundSettings, folder: Path, on_sound: OnDone
) -> LatentSource:
    """Return what a teacher learns from, which is rendered where it is not there yet.

    Args:
        teacher: with the codec that was fitted.
        settings: the recipe.
        folder: of the run.
        on_sound: called with the number of sounds that are done, and of all.
    """
    find = find_sounds if settings.sounds == "all" else find_notes
    sounds = find(
        sound_cache(settings, folder),
        teacher.codec,
        count=settings.notes,
        soundfont=settings.soundfont,
        on_sound=on_sound,
        seed=settings.loop.seed,
    )
    return sound_source(sounds, teacher.text)


def train_sound_teacher(
    teacher: Bundle,
    source: LatentSource,
    settings: SoundSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train a teacher's network, in place, to predict the velocity of the flow.

    Args:
        teacher: on the device where it is trained.
        source: of latents and captions.
        settings: the recipe.
        folder: the run's folder.
        on_iteration: called after every iteration with its figures.
        on_checkpoint: called before every checkpoint with the averaged weights in the network.
    """
    denoiser = teacher.denoiser
    device = denoiser.device
    batch_size = settings.loop.batch_size

    def loss(iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        share = world().share(batch_size)
        x0, conditioning = source.draw(batch_size, generator, randomness.words)
        t = draw_logit_normal_times(batch_size, generator)
        eps = torch.randn(x0.shape, generator=generator)
        return flow_loss(
            denoiser,
            sent(x0[share], device),
            conditioning[share].to(device),
            t=t[share],
            eps=sent(eps[share], device),
        )

    denoiser.network.requires_grad_(True).train()
    train_network(
        denoiser.network,
        loss,
        settings.loop,
        folder,
        name="sound",
        on_iteration=on_iteration,
        on_checkpoint=on_checkpoint,
    )
    denoiser.network.requires_grad_(False).eval()
