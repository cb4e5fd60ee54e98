"""Stable Audio is planned, distilled, written and played, at a tiny size, by what pictures are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.stable_audio import HOP, LONGEST, RATE, save_tiny_pipeline
from twostep.cli import app
from twostep.formats import read_contracts
from twostep.formats.locate import CONFIGS, STABLE_AUDIO_CONFIGS, STABLE_AUDIO_OPEN, find_model
from twostep.formats.stable_audio import stable_audio_contract
from twostep.media.audio import read_sound
from twostep.models.loading import load_bundle
from twostep.pipeline.provenance import read_provenance

RECIPE = """
model = "rain"
data = "twostep.data.drawn:drawn_by_teacher"
data_options = { prompts = "prompts.txt", count = 4, steps = 2 }
release = [2]
sample_prompts = ["drum loop"]

[[stages]]
student_steps = 2
teacher_steps = 4
iterations = 2
batch_size = 2
learning_rate = 1e-3
gradient_checkpointing = true
checkpoint_every = 2
log_every = 1
guidance = 2.0

[stages.method]
name = "adversarial"
mismatched_weight = 1.0
"""


def test_sounds_are_distilled_planned_played_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_pipeline(Path("rain"))
    Path("prompts.txt").write_text("rain on a roof\ndrum loop\n")
    Path("sounds.toml").write_text(RECIPE)

    def run(*arguments: str) -> str:
        answer = CliRunner().invoke(app, list(arguments))
        assert answer.exit_code == 0, answer.output
        return answer.output

    assert "2-adversarial-unconditional" in run("plan", "sounds.toml")
    run("distill", "sounds.toml", "--out", "run")
    assert [each.steps for each in read_contracts("run/model")] == [100, 2]
    teacher, student = load_bundle("run/model"), load_bundle("run/model", steps=2)
    weights = (teacher.denoiser.network, student.denoiser.network)
    learned, fixed = (network.proj_out.weight for network in weights)
    assert not torch.equal(learned, fixed)
    run("generate", "rain on a roof", "--model", "run/model", "--steps", "2", "-o", "out")
    (path,) = Path("out").glob("*.wav")
    sound, _ = read_sound(path, rate=RATE, mixed=False)
    assert sound.num_channels == 2 and len(sound) == HOP * LONGEST
    assert read_provenance(path).contract == student.contract
    run("replay", str(path))
    by_file = load_bundle(next(Path("run/model/students").glob("*.safetensors")))
    assert by_file.contract == student.contract
    run("export", "run/model", "--steps", "2", "--to", "diffusers", "-o", "exported")
    exported = load_bundle("exported")
    assert exported.contract.steps == 2 and exported.contract.role == "student"


def test_the_architecture_of_stable_audio_open_is_known_without_the_hub() -> None:
    assert find_model(STABLE_AUDIO_OPEN, only=CONFIGS) == STABLE_AUDIO_CONFIGS
    contract = stable_audio_contract(STABLE_AUDIO_CONFIGS)
    # 47.55 s at 44,100 Hz.
    assert contract.sizes == ((2_097_152, 1),)
    assert replace(contract, name="x", base="x").guidance == 7.0
