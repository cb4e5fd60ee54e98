"""What is read off headers and configs is answered without torch, and what draws loads little."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from twostep.formats.locate import WEIGHTS

HEAVY = ("torch", "diffusers", "transformers", "tokenizers", "peft", "numpy", "PIL", "jinja2")

LIGHT = """
import json, sys
from typer.testing import CliRunner
from twostep.cli import app
from twostep.contract import Contract
answers = {}
for arguments in json.loads(sys.argv[1]):
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, (arguments, answer.output)
    answers[" ".join(arguments)] = answer.output
print(json.dumps([[name for name in json.loads(sys.argv[2]) if name in sys.modules], answers]))
"""


def whole_file(path: Path, **marks: np.ndarray) -> Path:
    """A file with SDXL's four parts, of one number each, and marks of its noise."""
    one = np.zeros(1, np.float16)
    parts = (
        "model.diffusion_model.x",
        "first_stage_model.x",
        "conditioner.embedders.0.transformer.x",
        "conditioner.embedders.1.model.x",
    )
    save_file(dict.fromkeys(parts, one) | marks, path)
    return path


def test_what_says_something_of_models_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    without_contract = tmp_path / "mine"
    (without_contract / "unet").mkdir(parents=True)
    (without_contract / "vae").mkdir()
    (without_contract / "scheduler").mkdir()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (without_contract / name).write_bytes((WEIGHTS / "nano" / name).read_bytes())
    for part in ("unet", "vae"):
        config = (WEIGHTS / "nano" / part / "config.json").read_bytes()
        (without_contract / part / "config.json").write_bytes(config)
    levels = {"edm_vpred.sigma_max": np.array(120.0, np.float32)}
    cosxl = whole_file(tmp_path / "cosxl.safetensors", **levels)
    turbo = whole_file(tmp_path / "turboVision_4step.safetensors")
    lora = WEIGHTS / "nano" / "students" / "nano_2step_lora.safetensors"
    commands = [
        ["--help"],
        ["generate", "--help"],
        ["recipes"],
        ["info", "nano", "--json"],
        ["info", str(without_contract), "--json"],
        ["info", str(cosxl), "--json"],
        ["info", str(turbo), "--json"],
        ["info", "sdxl-lightning", "--json"],
        ["inspect", str(lora), "--json"],
    ]
    code = [sys.executable, "-c", LIGHT, json.dumps(commands), json.dumps(HEAVY)]
    process = subprocess.run(code, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    loaded, answers = json.loads(process.stdout)
    assert loaded == []
    contracts = {
        command[1]: json.loads(answers[" ".join(command)])
        for command in commands
        if command[0] == "info"
    }
    assert [each["steps"] for each in contracts["nano"]] == [32, 8, 4, 2, 1]
    (derived,) = contracts[str(without_contract)]
    assert derived["sizes"][0] == [64, 64]
    (edm,) = contracts[str(cosxl)]
    assert (edm["prediction_type"], edm["schedule"]["sigma_max"]) == ("v", 120.0)
    (few,) = contracts[str(turbo)]
    assert (few["steps"], few["guidance"], few["sampler"]) == (4, 1.0, "renoise")
    assert [each["trained_times"] for each in contracts["sdxl-lightning"]][2:] == 2 * [
        [1000, 750, 500, 250]
    ]
    told = json.loads(answers[f"inspect {lora} --json"])
    assert told["is"].startswith("a LoRA") and told["contract"]["steps"] == 2


DRAWS = """
import json, sys
from collections import Counter
from typer.testing import CliRunner
from twostep.cli import app
answer = CliRunner().invoke(app, ["generate", "a red apple", "--out", sys.argv[1]])
assert answer.exit_code == 0, answer.output
print(json.dumps(Counter(name.partition(".")[0] for name in sys.modules)))
"""

MANY = {"torch", "numpy", "twostep"}
"""The packages of which `generate` loads 60 modules or more."""

LEFT_OUT = {
    "bitsandbytes",
    "compel",
    "datasets",
    "diffusers",
    "fastapi",
    "jinja2",
    "matplotlib",
    "openvino",
    "pandas",
    "peft",
    "scipy",
    "starlette",
    "sympy",
    "tensorboard",
    "transformers",
    "uvicorn",
}
"""Packages that other commands need and a plain drawing does not; sympy is torch's compiler's."""


@pytest.mark.slow
def test_what_a_drawing_loads_is_known(tmp_path: Path) -> None:
    code = [sys.executable, "-c", DRAWS, str(tmp_path)]
    process = subprocess.run(code, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    loaded = json.loads(process.stdout.splitlines()[-1])
    assert {name for name, count in loaded.items() if count >= 60} <= MANY
    assert loaded.keys() & LEFT_OUT == set()
