"""A LoRA out of two checkpoints: the nearest change of low rank, layer by layer (Eckart and Young,
by SVD).
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from twostep.contract import student_name
from twostep.export.card import Card
from twostep.export.writing import ExportJob
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import LowRank, write_lora
from twostep.models.bundle import load_bundle


def extract(
    base: str, tuned: str, out: Path, *, rank: int, steps: int | None = None
) -> tuple[float, list[str]]:
    """Write what turns `base` into `tuned` (its student of so many steps) as a LoRA that every
    program reads.

    Returns which share of the change it lacks, 0 for none, and the weights that changed and no LoRA
    has a place for. Raises ModelError for models of two kinds, or that are the same.
    """
    before, after = load_bundle(base), load_bundle(tuned, steps=steps)
    lora, left, lacks, whole = dict[str, LowRank](), list[str](), 0.0, 0.0
    for part, network in after.parts.items():
        old = before.parts[part].state_dict()
        for key, value in network.state_dict().items():
            if key not in old or old[key].shape != value.shape:
                raise ModelError(
                    f"{base} and {tuned} are of two kinds: {part}.{key} is not the same in both."
                )
            change, layer = value - old[key], key.removesuffix(".weight")
            if not change.any():
                continue
            if (
                not isinstance(network.get_submodule(key.rpartition(".")[0]), nn.Linear | nn.Conv2d)
                or layer == key
            ):
                left.append(f"{part}.{key}")
                continue
            low = lora[f"{part}.{layer}"] = low_rank(change, rank)
            lacks += (low.change - change.flatten(1)).square().sum().item()
            whole += change.square().sum().item()
    if not lora:
        raise ModelError(f"No layer of {tuned} differs from {base}: there is nothing to extract.")
    contract, told = after.contract, before.contract.name
    if contract.role == "student":
        name = student_name(told, contract.steps)
        contract = replace(contract, name=name, base=told, lora_rank=rank, lora_alpha=float(rank))
    tensors, metadata = write_lora(lora, before.parts, "kohya")
    metadata |= contract.to_metadata() if contract.role == "student" else {}
    ExportJob(contract, "lora-kohya", out, before.denoiser.network, Card()).send(tensors, metadata)
    return (lacks / whole) ** 0.5, left


def low_rank(change: Tensor, rank: int) -> LowRank:
    """Return the nearest product of such a rank to a layer's change [out, in, ...], evenly split
    between its halves.
    """
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # its start is random, and nobody else's randomness is moved on
        u, s, v = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    up, down = u[:, :rank] * s[:rank].sqrt(), (v[:, :rank] * s[:rank].sqrt()).T
    return LowRank(
        down.reshape(rank, *change.shape[1:]),
        up.reshape(*up.shape, *[1] * (change.dim() - 2)),
        float(rank),
    )
