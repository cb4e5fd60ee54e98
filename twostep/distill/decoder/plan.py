"""The plan of a decoder's run, found out as that of a chain is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from twostep.distill.beginning import check_shares
from twostep.distill.decoder.recipe import DecoderRecipe
from twostep.distill.decoder.run import TrainedDecoder, codec_of, fresh_decoder
from twostep.distill.plan import (
    Advice,
    OnPlanned,
    Plan,
    blank_source,
    device_type,
    item_size,
    measure,
    metering,
    plan_stage,
    read_cache,
    try_changes,
    unheard,
)
from twostep.models.bundle import modules_of
from twostep.models.loading import load_bundle
from twostep.networks.digest import num_weight_bytes


def plan_decoder(
    recipe: DecoderRecipe, *, processes: int = 1, advance: OnPlanned = unheard
) -> Plan:
    """Return the plan of a recipe; only the configs of its model are read.

    Args:
        recipe: what would be run.
        processes: how many train together, of which one is planned.
        advance: called once before the stage, as `plan` calls it.

    Raises:
        ModelError: not even these can be found, or the model does not make pictures.
        RecipeError: the decoder does not fit the model's latents, or so many processes cannot share
            a batch alike.
    """
    stage = recipe.decoder
    advance(0, 1, stage.name)
    check_shares([stage], processes)
    sizes, num_items = read_cache(recipe)
    device = device_type(recipe)
    on_cpu = device == "cpu"
    with metering(on_cpu=on_cpu) as meter:
        teacher = load_bundle(recipe.model, outline=True)
        codec = codec_of(teacher)
        layout = stage.layout(codec, teacher.contract.base)
        source = blank_source(teacher, sizes)
        # Nothing but the autoencoder goes to the device.
        autoencoder = sum(map(num_weight_bytes, modules_of(codec)))
        network = fresh_decoder(layout, stage)
        standing = autoencoder + num_weight_bytes(network)
        before = meter.living
        meter.peak = before
        TrainedDecoder(codec, network).tiny(torch.empty(recipe.num_samples, *source.latents))
        drawing = meter.peak - before
        measured = measure(stage, source, codec, network, meter, processes=processes)
    planned = plan_stage(stage, standing, measured, drawing, on_cpu=on_cpu, processes=processes)
    item_bytes = item_size(source, with_texts=recipe.cache is not None)
    return Plan((planned,), item_bytes, num_items, device)


def advise_decoder(
    recipe: DecoderRecipe, processes: int = 1, advance: OnPlanned = unheard
) -> list[Advice]:
    """Return changes of the decoder's training that make it smaller, with its peak after each.

    As `advise` does for a stage of a chain.
    """
    stage = recipe.decoder
    changes: list[dict[str, Any]] = []
    if stage.batch_size > 1 and stage.batch_size % (2 * processes) == 0:
        changes.append({"batch_size": stage.batch_size // 2})
    if stage.crop is None or stage.crop > 1:
        latents = load_latent_side(recipe)
        changes.append({"crop": (stage.crop or latents) // 2})
    if stage.precision == "fp32":
        changes.append({"precision": "bf16"})
    return try_changes(changes, lambda change: _changed_peak(recipe, change, processes), advance)


def load_latent_side(recipe: DecoderRecipe) -> int:
    """Return the shorter side of the largest latents that a recipe learns from."""
    sizes, _ = read_cache(recipe)
    if sizes:
        return max(map(min, sizes))
    with metering(on_cpu=True):
        teacher = load_bundle(recipe.model, outline=True)
    return min(teacher.latent_shape(*teacher.contract.sizes[0])[1:])


def _changed_peak(recipe: DecoderRecipe, change: Mapping[str, Any], processes: int) -> int:
    stage = recipe.decoder.model_copy(update=change)
    changed = recipe.model_copy(update={"decoder": stage})
    return plan_decoder(changed, processes=processes).stages[0].highest
