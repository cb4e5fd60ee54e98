"""ComfyUI's model folders with files of every kind: small random weights, true names and
contracts.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from twostep.contract import Contract
from twostep.formats.lora_files import LowRank, write_lora
from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle

from ..vanilla import assemble, with_sdxl_vae, write_single_file

STUDENT = Contract(
    name="small-4step",
    role="student",
    steps=4,
    trained_times=(1000, 750, 500, 250),
    prediction_type="eps",
    spacing="trailing",
    guidance=1.0,
    sizes=((64, 64),),
    base="small",
    lora_rank=None,
    lora_alpha=None,
    recipe="a test",
    version="0",
)


def student_of(steps: int, **changes: object) -> Contract:
    """The contract of a student of so many steps."""
    fields = {
        "name": f"small-{steps}step",
        "steps": steps,
        "prediction_type": "x0" if steps == 1 else "eps",
    }
    return replace(STUDENT, **fields | changes)


def small(seed: int) -> Bundle:
    """A nano bundle with the kind of autoencoder that single files hold."""
    return with_sdxl_vae(random_bundle(seed))


def lora_of(bundle: Bundle) -> dict[str, LowRank]:
    """A LoRA of rank 2 on queries."""
    generator, changes = torch.Generator().manual_seed(1), {}
    for name, module in bundle.denoiser.network.named_modules():
        if name.endswith("to_q"):
            rows, columns = module.weight.shape
            down = torch.randn(2, columns, generator=generator) / 8
            changes[f"unet.{name}"] = LowRank(
                down, torch.randn(rows, 2, generator=generator) / 8, 1.0
            )
    return changes


class Shelf:
    """Writes files into ComfyUI's folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundle = small(0)
        for name in ("checkpoints", "diffusion_models", "loras", "embeddings"):
            (root / name).mkdir(parents=True)

    def checkpoint(self, name: str, contract: Contract | None = None, **more: Tensor) -> Path:
        """Write a whole checkpoint, and beside it the configs that tell a small one's shapes."""
        path = self.root / "checkpoints" / f"{name}.safetensors"
        write_single_file(
            self.bundle, path, None if contract is None else contract.to_metadata(), **more
        )
        return path

    def configs(self, path: Path) -> None:
        """Let twostep itself load a small checkpoint: SDXL's own configs do not fit it."""
        assemble(self.bundle).save_pretrained(path.with_suffix(""))

    def unet(self, name: str, contract: Contract | None = None) -> Path:
        """Write a UNet alone, by diffusers' names."""
        path = self.root / "diffusion_models" / f"{name}.safetensors"
        save_file(
            self.bundle.denoiser.network.state_dict(),
            path,
            contract.to_metadata() if contract else None,
        )
        return path

    def lora(self, name: str, contract: Contract | None = None, *, dialect: str = "kohya") -> Path:
        """Write a LoRA of the UNet."""
        path, lora = self.root / "loras" / f"{name}.safetensors", lora_of(self.bundle)
        weights, more = write_lora(lora, self.bundle.parts, dialect)
        metadata = {} if dialect == "kohya" else more
        save_file(weights, path, metadata | (contract.to_metadata() if contract else {}))
        return path


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "models")
