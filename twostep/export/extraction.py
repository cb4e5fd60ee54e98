"""A LoRA out of two checkpoints: layer by layer the nearest change of low rank.

That is a truncated singular value decomposition (Eckart and Young, 1936).
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from twostep.contract import Contract, student_name
from twostep.export.card import Card
from twostep.export.pictures_only import check_makes_pictures
from twostep.export.writing import ExportJob
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import write_lora
from twostep.formats.lora_kinds import LowRank, WeightChange
from twostep.models.loading import load_bundle

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
"""How exact the randomised decomposition is (arXiv 0909.4061)."""


@dataclass
class _Difference:
    """What turns one model into another.

    `lora` is the part that a LoRA can express, `left_out` the changed weights that it has no place
    for. `squared_error` and `squared_change` are summed over the layers of `lora`.
    """

    lora: dict[str, WeightChange] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    squared_error: float = 0.0
    squared_change: float = 0.0

    def add(self, part: str, network: nn.Module, key: str, *, change: Tensor, rank: int) -> None:
        """Add the change of one weight of a network."""
        if not change.any():
            return
        name, _, kind = key.rpartition(".")
        if kind != "weight" or not isinstance(network.get_submodule(name), nn.Linear | nn.Conv2d):
            self.left_out.append(f"{part}.{key}")
            return
        reduced = low_rank(change, rank)
        self.lora[f"{part}.{name}"] = reduced
        self.squared_error += (reduced.change - change.flatten(1)).square().sum().item()
        self.squared_change += change.square().sum().item()


def extract(
    base: str, tuned: str, out: Path, *, rank: int, steps: int | None = None
) -> tuple[float, list[str]]:
    """Write what turns one model into another as a LoRA that every program reads.

    Arguments:
        base: the model that the LoRA will go on.
        tuned: what the base is to become.
        out: the .safetensors to write, with a card and workflows beside it.
        rank: the rank of every layer, or less where the layer itself has less.
        steps: picks a student of `tuned`.

    Returns the share of the change that the LoRA lacks (0 for none), and the names of the weights
    that changed and that a LoRA has no place for. Raises ModelError if the models are of two kinds,
    or are the same.
    """
    before = load_bundle(base)
    after = load_bundle(tuned, steps=steps)
    for bundle in (before, after):
        check_makes_pictures(bundle.contract, "LoRAs")
    difference = _Difference()
    for part, network in after.parts.items():
        old = before.parts[part].state_dict()
        for key, value in network.state_dict().items():
            if key not in old or old[key].shape != value.shape:
                raise ModelError(
                    f"{base} and {tuned} are of two kinds: {part}.{key} is not the same in both."
                )
            difference.add(part, network, key, change=value - old[key], rank=rank)
    if not difference.lora:
        raise ModelError(f"No layer of {tuned} differs from {base}: there is nothing to extract.")
    contract = after.contract
    if contract.role == "student":
        contract = _student_lora(contract, before.contract.name, rank)
    tensors, metadata = write_lora(difference.lora, before.parts, "kohya")
    if contract.role == "student":
        metadata |= contract.to_metadata()
    job = ExportJob(
        contract=contract,
        to="lora-kohya",
        out=out,
        network=before.denoiser.network,
        card=Card(),
    )
    job.write(tensors, metadata)
    lacking = (difference.squared_error / difference.squared_change) ** 0.5
    return lacking, difference.left_out


def _student_lora(contract: Contract, base: str, rank: int) -> Contract:
    """Return the contract of a LoRA that makes a student of `base`."""
    return replace(
        contract,
        name=student_name(base, contract.steps),
        base=base,
        lora_rank=rank,
        lora_alpha=float(rank),
    )


def low_rank(change: Tensor, rank: int) -> LowRank:
    """Return the nearest product of such a rank to a layer's change [out, in, ...].

    The singular values are evenly split between its halves.
    """
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    size = min(rank + _OVERSAMPLING, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # its start is random, and nobody else's randomness is moved on
        u, s, v = torch.svd_lowrank(matrix, q=size, niter=_POWER_ITERATIONS)
    root = s[:rank].sqrt()
    up = u[:, :rank] * root
    down = (v[:, :rank] * root).T
    return LowRank(
        down=down.reshape(rank, *change.shape[1:]),
        up=up.reshape(*up.shape, *[1] * (change.dim() - 2)),
        alpha=float(rank),
    )
