"""A small model with the kind of autoencoder that SDXL has, in a folder of the documented layout,
with students.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from twostep.cli import app
from twostep.contract import Contract
from twostep.diffusion import trained_times
from twostep.formats.lora_files import LowRank
from twostep.models.bundle import Bundle
from twostep.networks.adapters import TARGETS
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble, with_sdxl_vae


def small_bundle(seed: int = 0) -> Bundle:
    return with_sdxl_vae(random_bundle(seed), layers_per_block=2)


def student_contract(teacher: Contract, steps: int, rank: int | None = None) -> Contract:
    return replace(
        teacher,
        name=f"random-{steps}step",
        role="student",
        steps=steps,
        guidance=1.0,
        trained_times=trained_times(steps),
        prediction_type="x0" if steps == 1 else "eps",
        lora_rank=rank,
        lora_alpha=None if rank is None else rank / 2,
    )


def random_lora(
    bundle: Bundle, rank: int = 3, alpha: float = 1.5, ends: tuple[str, ...] = TARGETS
) -> dict[str, LowRank]:
    """A LoRA on every target of the UNet, and on the attention of both text encoders."""
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for part, network in bundle.parts.items():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.endswith(
                (*ends, "q_proj", "out_proj")
            ):
                shape = module.weight.shape
                down = torch.randn((rank, *shape[1:]), generator=generator) / 8
                up = torch.randn((shape[0], rank, *[1] * (len(shape) - 2)), generator=generator) / 8
                changes[f"{part}.{name}"] = LowRank(down, up, alpha)
    return changes


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Run a verb in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return small_bundle()


@pytest.fixture(scope="session")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher, and whole students of 4 steps and of 1."""
    folder = tmp_path_factory.mktemp("models") / "random"
    assemble(bundle, timestep_spacing="trailing").save_pretrained(folder)
    (folder / "twostep.json").write_text(bundle.contract.to_json())
    (folder / "students").mkdir()
    for steps in (4, 1):
        contract = student_contract(bundle.contract, steps)
        weights = random_bundle(steps).denoiser.network.state_dict()
        save_file(
            weights,
            folder / "students" / f"random_{steps}step_unet.safetensors",
            contract.to_metadata(),
        )
    return folder
