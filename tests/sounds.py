"""Small models of sounds, and sounds to try them on, which need no soundfont."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from twostep.contract import student_name
from twostep.media.audio import AudioCodec
from twostep.models.bundle import Bundle
from twostep.models.saving import save_bundle, save_student
from twostep.pretrain.loop import NetworkLoopSettings
from twostep.pretrain.notes import NUM_SAMPLES, RATE, Labels, fitted_codec, random_labels
from twostep.pretrain.sound import SoundSettings, new_sound_teacher

LOOP = NetworkLoopSettings(
    iterations=4,
    batch_size=4,
    learning_rate=1e-3,
    warmup_iterations=1,
    precision="fp32",
    checkpoint_every=2,
    log_every=1,
    ema_decay=0.5,
)

TINY = SoundSettings(bands=32, components=8, width=32, depth=2, heads=2, loop=LOOP)


def tones(labels: Labels) -> Tensor:
    """Return a decaying tone with two overtones for every label, whose share is the
    instrument's."""
    seconds = torch.arange(NUM_SAMPLES) / RATE
    numbers = labels.double()
    phases = 2 * torch.pi * 440 * 2 ** ((numbers[:, 1:2] - 69) / 12) * seconds
    overtones = numbers[:, 0:1] / 20
    tone = phases.sin() + overtones * (2 * phases).sin() + overtones * (3 * phases).sin()
    loudness = 0.1 + 0.2 * numbers[:, 2:3]
    return (loudness * tone * (-3 * seconds).exp()).float()


def tiny_sound_model(count: int = 40) -> tuple[Bundle, Labels]:
    """Return a teacher with random weights whose codec is fitted to tones, and their labels."""
    labels = random_labels(count, torch.Generator().manual_seed(0))
    bundle = new_sound_teacher(TINY, "tiny")
    assert isinstance(bundle.codec, AudioCodec)
    codec = fitted_codec(bundle.codec, tones(labels))
    network = bundle.denoiser.network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in network.parameters():
            # The layers that start at zero too, or nothing would depend on anything.
            weight.data += 0.05 * torch.randn_like(weight)
    network.eval().requires_grad_(False)
    return replace(bundle, codec=codec), labels


def save_sound_model(path: Path) -> Path:
    """Write a model "sounds" of random weights with a student of two steps; return its folder."""
    bundle = tiny_sound_model()[0]
    bundle = replace(bundle, contract=replace(bundle.contract, name="sounds", base="sounds"))
    save_bundle(bundle, path)
    contract = replace(
        bundle.contract,
        name=student_name("sounds", 2),
        role="student",
        steps=2,
        trained_times=(1.0, 0.5),
        guidance=1.0,
    )
    save_student(bundle.denoiser.network.state_dict(), contract, path)
    return path
