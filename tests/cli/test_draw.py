"""generate and info as a user runs them, with good input and bad."""

import json
import re
from pathlib import Path

import pytest

from twostep.pipeline.provenance import read_provenance

PROMPT = "a 3d red apple on a blue background"


def assert_one_clean_line(answer, *lessons) -> None:
    """An error is one line for a person: no traceback, exit code 1, and what to do."""
    assert answer.exit_code == 1, answer.output
    assert isinstance(answer.exception, SystemExit)
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    for lesson in lessons:
        assert lesson in answer.stderr


def test_generate_writes_pictures_that_say_how_they_were_made(
    run, model: Path, tmp_path: Path
) -> None:
    answer = run(
        "generate",
        PROMPT,
        "--model",
        model,
        "--steps",
        2,
        "-n",
        4,
        "--seed",
        7,
        "-o",
        tmp_path / "out",
    )
    assert answer.exit_code == 0, answer.output
    paths = answer.stdout.splitlines()
    (times,) = answer.stderr.splitlines()
    assert sorted(map(Path, paths)) == sorted((tmp_path / "out").glob("*.png"))
    assert [read_provenance(path).request.seed for path in paths] == [7, 8, 9, 10]
    assert read_provenance(paths[0]).contract.steps == 2
    assert times.startswith("4 images, ")
    assert all(stage in times for stage in ("text", "denoise", "decode", "loading"))
    assert "warning" not in answer.stderr


def test_generate_with_the_teacher_guided(run, model: Path, tmp_path: Path) -> None:
    answer = run(
        "generate",
        PROMPT,
        "--model",
        model,
        "--steps",
        32,
        "--guidance",
        3,
        "--negative",
        "flat",
        "-o",
        tmp_path,
    )
    assert answer.exit_code == 0, answer.output
    provenance = read_provenance(next(tmp_path.glob("*.png")))
    assert (provenance.contract.role, provenance.request.guidance) == ("teacher", 3)
    assert "Negative prompt: flat" in provenance.parameters


def test_warnings_are_printed(run, model: Path, tmp_path: Path) -> None:
    answer = run(
        "generate", "a zyzzyva", "--model", model, "--guidance", 5, "--seed", 2**32, "-o", tmp_path
    )
    assert answer.exit_code == 0
    for lesson in ("zyzzyva", "was distilled into it", "same noise as seed 0"):
        assert any(
            line.startswith("warning: ") and lesson in line for line in answer.stderr.splitlines()
        )


def test_empty_prompt_draws_and_warns(run, model: Path, tmp_path: Path) -> None:
    answer = run("generate", "", "--model", model, "-o", tmp_path)
    assert answer.exit_code == 0
    assert "the prompt is empty" in answer.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1


BAD_FLAGS = [
    (("-n", 0), "at least one image"),
    (("--seed", -1), "from 0 up"),
    (("--seed", 2**63), "2**63"),
    (("--size", "64"), "such as 64x64"),
    (("--size", "128x128"), "64x64"),
    (("--guidance", "nan"), "from 0 up"),
]


@pytest.mark.parametrize(("flags", "lesson"), BAD_FLAGS)
def test_bad_flag_is_one_clean_line(run, model: Path, tmp_path: Path, flags, lesson: str) -> None:
    answer = run("generate", PROMPT, "--model", model, "-o", tmp_path / "out", *flags)
    assert_one_clean_line(answer, lesson)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("steps", [0, 3])
def test_steps_without_a_student_list_those_there_are(
    run, model: Path, tmp_path: Path, steps: int
) -> None:
    answer = run("generate", PROMPT, "--model", model, "--steps", steps, "-o", tmp_path / "out")
    assert_one_clean_line(answer)
    named = re.findall(r"\d+", answer.stderr.replace(str(model), ""))
    assert {str(steps), "8", "4", "2", "1"} <= set(named), answer.stderr


def test_steps_default_to_two_where_there_is_a_two_step_student(
    run, model: Path, student_file: Path, tmp_path: Path
) -> None:
    for which, expected in ((model, 2), (student_file, 4)):
        out = tmp_path / str(expected)
        assert run("generate", PROMPT, "--model", which, "-o", out).exit_code == 0
        assert read_provenance(next(out.glob("*.png"))).contract.steps == expected


def test_output_that_cannot_be_written_is_found_before_work_is_spent(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    answer = run(
        "generate",
        PROMPT,
        "--model",
        "no model is needed for this",
        "-o",
        tmp_path / "file" / "below",
    )
    assert_one_clean_line(answer, "cannot write to", "Choose a folder")


def truncated(folder: Path, student: Path) -> Path:
    path = folder / "truncated.safetensors"
    path.write_bytes(student.read_bytes()[:-1000])
    return path


def foreign(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, folder / "foreign.safetensors", {"format": "pt"})
    return folder / "foreign.safetensors"


def no_safetensors(folder: Path) -> Path:
    (folder / "text.safetensors").write_text("this is text")
    return folder / "text.safetensors"


@pytest.mark.parametrize("verb", [("info",), ("generate", PROMPT, "--model")])
def test_what_is_no_model_is_one_clean_line(run, student_file: Path, tmp_path: Path, verb) -> None:
    (tmp_path / "empty").mkdir()
    for wrong in (
        truncated(tmp_path, student_file),
        foreign(tmp_path),
        no_safetensors(tmp_path),
        tmp_path / "empty",
        tmp_path / "missing",
    ):
        out = () if verb == ("info",) else ("-o", tmp_path / "out")
        assert_one_clean_line(run(*verb, wrong, *out), wrong.stem)


def test_info_shows_the_teacher_and_every_student(run, model: Path) -> None:
    answer = run("info", model)
    assert answer.exit_code == 0
    for word in ("teacher", "student", "trained times", "250", "trailing", "64x64"):
        assert word in answer.stdout


def test_info_as_json_is_a_list_of_contracts(run, model: Path, student_file: Path) -> None:
    contracts = json.loads(run("info", model, "--json").stdout)
    assert [contract["steps"] for contract in contracts] == [32, 8, 4, 2, 1]
    assert contracts[0]["role"] == "teacher"
    assert [
        contract["role"] for contract in json.loads(run("info", student_file, "--json").stdout)
    ] == ["student"]
