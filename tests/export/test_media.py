"""Models of clips and sounds in every form: written so that they load again, or refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from comfyui.sampling import explain, read_contract
from tests.clips import save_clip_model
from tests.sounds import save_sound_model
from twostep.cli import app
from twostep.contract import ContractError
from twostep.distill.snapshots import usual_targets
from twostep.export.conversion import convert
from twostep.export.extraction import extract
from twostep.export.hub import files_to_push
from twostep.export.verification import verify
from twostep.export.writing import MOTION_LORA, TARGETS, export
from twostep.formats import resolve
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import DIALECTS
from twostep.models.loading import load_bundle
from twostep.pipeline.provenance import comfyui_chunks
from twostep.pipeline.request import ModelTraits, Request
from twostep.reports.genai import is_readable

MEDIA = {"clips": ("video", save_clip_model), "sounds": ("audio", save_sound_model)}


@pytest.fixture(scope="module", params=list(MEDIA))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each medium, called as what it makes."""
    _, save = MEDIA[request.param]
    return save(tmp_path_factory.mktemp("media") / request.param)


def student_of(model: Path) -> Path:
    (student,) = (model / "students").glob("*.safetensors")
    return student


REFUSED: dict[str, Callable[[Path, Path], object]] = {
    **{
        f"export-{to}": lambda model, out, to=to: export(model, to, out, steps=2)
        for to in TARGETS
        if to not in ("diffusers", MOTION_LORA)
    },
    **{
        f"export-{to}-file": lambda model, out, to=to: export(student_of(model), to, out)
        for to in TARGETS
        if to not in ("diffusers", MOTION_LORA)
    },
    "export-diffusers-with-lora": lambda model, out: export(
        model, "diffusers", out.with_suffix(""), loras=("nano_4step_lora",)
    ),
    **{
        f"convert-{to}": lambda model, out, to=to: convert(model, to, out)
        for to in (*DIALECTS, "diffusers", "single-file")
    },
    **{
        f"convert-{to}-file": lambda model, out, to=to: convert(student_of(model), to, out)
        for to in (*DIALECTS, "diffusers", "single-file")
    },
    "extract": lambda model, out: extract(str(model), str(model), out, rank=2, steps=2),
    "extract-on-nano": lambda model, out: extract("nano", str(model), out, rank=2, steps=2),
    "verify": lambda model, _: verify(model, prompt="a cat", steps=2),
    "verify-comfyui": lambda model, out: verify(model, prompt="a cat", comfyui=out.parent),
    "comfyui-node": lambda model, _: read_contract(student_of(model)),
}


@pytest.mark.parametrize("form", list(REFUSED))
def test_a_form_for_pictures_is_refused_with_the_medium_and_what_to_do(
    form: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as refused:
        REFUSED[form](model, tmp_path / "out.safetensors")
    message = str(refused.value)
    name = model.name
    assert message.startswith((f"{name} makes {name}, and ", f"{name}-2step makes {name}, and "))
    assert "for models of pictures alone. Export it to diffusers" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [None, 2])
def test_the_folder_of_its_own_family_is_written_loads_again_and_goes_to_the_hub(
    model: Path, tmp_path: Path, steps: int | None
) -> None:
    out = export(model, "diffusers", tmp_path / "exported", steps=steps)
    before, after = load_bundle(model, steps=steps), load_bundle(out)
    assert after.contract == before.contract
    weights = after.denoiser.network.state_dict()
    for name, value in before.denoiser.network.state_dict().items():
        assert (weights[name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-6
    files = files_to_push(out, "me/model")
    assert {"README.md", "twostep.json"} <= files.keys()

    text = files["README.md"].read_text()
    medium, _ = MEDIA[model.name]
    head = ModelCard(text).data.to_dict()
    assert head["pipeline_tag"] == f"text-to-{medium}"
    assert head["library_name"] == "twostep"
    assert f"gives wrong {model.name}" in text
    for foreign in ("ComfyUI", "image = ", "wrong pictures"):
        assert foreign not in text
    script = text.partition("```python\n")[2].partition("```")[0]
    script = script.replace('"exported"', repr(str(out))).replace('"out"', repr(str(tmp_path)))
    exec(compile(script, "card", "exec"), {})
    (made,) = (path for path in tmp_path.iterdir() if path.is_file())
    assert made.suffix == {"video": ".webp", "audio": ".wav"}[medium]


def test_what_is_not_asked_for_by_name_is_left_out(model: Path) -> None:
    """Snapshots, graphs for ComfyUI, and OpenVINO GenAI."""
    checkpoint = resolve(model)
    assert usual_targets(checkpoint.contract) == ("diffusers",)
    assert comfyui_chunks(checkpoint.contract, Request("a cat"), ModelTraits()) == {}
    assert not is_readable(load_bundle(model))
    # What a file is, ComfyUI's node for contracts says, or that it has no sampler for it.
    if checkpoint.contract.prediction_type == "flow":
        with pytest.raises(ContractError, match="Draw with it in twostep"):
            explain(student_of(model))
    else:
        assert model.name in explain(student_of(model))


def test_the_command_says_it_in_one_line(model: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    out = tmp_path / "lora.safetensors"
    for arguments in (
        ["export", str(model), "--to", "comfyui", "--out", str(out)],
        ["extract", str(model), str(model), "--steps", "2", "--out", str(out)],
        ["convert", str(model), "--to", "single-file", "--out", str(out)],
        ["verify", str(model), "--steps", "2"],
    ):
        answer = CliRunner().invoke(app, arguments)
        assert answer.exit_code == 1
        words = " ".join(answer.output.split())
        assert f"makes {model.name}, and" in words and "Export it to diffusers" in words
