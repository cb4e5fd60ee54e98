"""The verbs on files as a user types them; what they do is tested in tests/export."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open


def test_inspect_says_it_to_people_and_to_programs(run: Callable, student_file: Path) -> None:
    answer = run("inspect", student_file)
    assert answer.exit_code == 0
    assert all(
        word in answer.stdout
        for word in ("a UNet alone for SDXL's classes", "diffusers", "random-4step", "F32")
    )
    told = json.loads(run("inspect", "nano_2step_lora", "--json").stdout)
    assert (told["names"], told["rank"], told["contract"]["steps"]) == ("PEFT", "12", 2)


def test_inspect_of_a_part_without_a_contract_and_of_a_folder(run: Callable, model: Path) -> None:
    (vae,) = (model / "vae").glob("*.safetensors")
    answer = run("inspect", vae)
    assert "a tiny autoencoder" in answer.stdout and "carries no contract" in answer.stdout
    refused = run("inspect", model)
    assert refused.exit_code == 1 and "twostep info" in refused.output


def test_inspect_of_what_is_no_file_is_one_red_line(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04 and so on")
    refused = run("inspect", tmp_path / "x.ckpt")
    assert (
        refused.exit_code == 1
        and "is a pickle" in refused.output
        and "Traceback" not in refused.output
    )


def test_export_convert_and_extract_write_what_they_say(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    lora, peft = tmp_path / "lora.safetensors", tmp_path / "peft.safetensors"
    for words, written in (
        (("extract", model, "nano", "--rank", 2, "--out", lora), False),
        (("extract", model, model, "--steps", 4, "--rank", 2, "--out", lora), False),
        (
            (
                "export",
                "nano",
                "--steps",
                2,
                "--to",
                "lora-kohya",
                "--out",
                lora,
                "--license",
                "cc0-1.0",
            ),
            True,
        ),
        (("convert", lora, "--to", "peft", "--out", peft), True),
        (("convert", lora, "--to", "peft", "--out", peft), False),
    ):
        answer = run(*words)
        assert (answer.exit_code == 0) == written, answer.output
        out = words[words.index("--out") + 1]
        assert answer.stdout == (f"{out}\n" if written else "")
        assert ("error: " in answer.stderr) != written
    assert "license: cc0-1.0" in (tmp_path / "lora.md").read_text()
    with safe_open(peft, "pt") as file:
        assert "lora_adapter_metadata" in file.metadata() and "twostep.contract" in file.metadata()
