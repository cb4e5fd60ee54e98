"""The whole way of a sound: a teacher is distilled by the recipes of pictures, and heard."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.sounds import tiny_sound_model, tones
from twostep.cli import app
from twostep.contract import RectifiedFlowSpec
from twostep.formats import read_contracts
from twostep.media.audio import read_sound
from twostep.models.saving import save_bundle
from twostep.pipeline.provenance import read_provenance
from twostep.pretrain.notes import NoteCache, encoded

RECIPE = """
model = "teacher"
data = "twostep.pretrain.notes:rendered"
data_options = { notes = "notes.safetensors" }
release = [2, 1]
sample_prompts = ["a piano note, C4"]

[defaults]
iterations = 2
batch_size = 4
learning_rate = 1e-4
checkpoint_every = 2
log_every = 1

[[stages]]
student_steps = 2
teacher_steps = 4
guidance = 2.0
method = { name = "regression" }

[[stages]]
student_steps = 2
teacher_steps = 4
guidance = 2.0
method = { name = "adversarial", mismatched_weight = 1.0 }

[[stages]]
student_steps = 1
teacher_steps = 2
method = { name = "adversarial", objective = "conditional", loss = "non-saturating" }
"""


@pytest.mark.slow
def test_sounds_are_distilled_planned_played_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, labels = tiny_sound_model()
    save_bundle(teacher, Path("teacher"))
    NoteCache(encoded(tones(labels), teacher.codec), labels).save(Path("notes.safetensors"))
    Path("sounds.toml").write_text(RECIPE)

    def run(*arguments: str) -> str:
        answer = CliRunner().invoke(app, list(arguments))
        assert answer.exit_code == 0, answer.output
        return answer.output

    planned = run("plan", "sounds.toml")
    assert "1-adversarial-conditional" in planned
    run("distill", "sounds.toml", "--out", "run")
    assert [each.steps for each in read_contracts("run/model")] == [32, 2, 1]
    for steps in ("2", "1"):
        output = run(
            "generate", "a high violin note", "--model", "run/model", "--steps", steps, "-o", "out"
        )
        assert "1 item, " in output
    first, second = sorted(Path("out").glob("*.wav"))
    assert "1step" in first.name and "2step" in second.name
    provenance = read_provenance(second)
    assert provenance.contract.media == "audio" and provenance.contract.steps == 2
    assert provenance.contract.schedule == RectifiedFlowSpec()
    assert provenance.request.prompt == "a high violin note"
    sound, _ = read_sound(second, rate=16_000)
    assert len(sound.samples) == 16_384
    assert "every sample of" in run("replay", str(second), "-o", "again")
    warned = run("generate", "a banjo note", "--model", "run/model", "-o", "out")
    assert "banjo" in warned
