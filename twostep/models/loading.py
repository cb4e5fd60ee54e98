"""From a name, a path or a checkpoint to a bundle that is ready to sample."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from twostep.formats.checkpoint import Checkpoint, resolve
from twostep.formats.locate import CONFIGS, ModelError
from twostep.formats.lora_files import merge_lora
from twostep.models.bundle import Bundle
from twostep.models.families import LoadsToDraw, family_of
from twostep.models.lora_stack import LoraFile, all_embeddings, find_lora, spelled


def load_bundle(
    model: str | Path | Checkpoint = "nano", *, steps: int | None = None, outline: bool = False
) -> Bundle:
    """Load a model, frozen and in float32 on the CPU.

    Arguments:
        model: a built-in name, a model folder, a .safetensors file, an official name, a hub id, or
            a checkpoint that `formats.resolve` returned.
        steps: picks the student of so many steps; None is the teacher, or the file's own student.
        outline: read configs alone, and leave the weights as they are initialised.

    Raises ModelError if there is no such model or student, and lists those there are.
    """
    checkpoint = resolve(model, steps=steps, only=CONFIGS if outline else None)
    family = family_of(checkpoint.contract_for(steps))
    return family.load(checkpoint, steps=steps, outline=outline)


def load_to_draw(model: str | Path | Checkpoint = "nano", *, steps: int | None = None) -> Bundle:
    """Load a model as `load_bundle` does, with networks that need do no more than draw.

    They are there sooner, and cannot be trained or written.
    """
    checkpoint = resolve(model, steps=steps)
    family = family_of(checkpoint.contract_for(steps))
    if isinstance(family, LoadsToDraw):
        return family.load_to_draw(checkpoint, steps=steps)
    return family.load(checkpoint, steps=steps)


def load_with_loras(
    model: str | Path | Checkpoint,
    loras: Sequence[str | LoraFile],
    *,
    steps: int | None = None,
    embeddings: Sequence[str] | None = None,
) -> Bundle:
    """Load a model and merge LoRAs into its weights, in order.

    Where several stacks of LoRAs take turns on one model, use `lora_stack.LoraCache`, which leaves
    the model as it is.

    Arguments:
        model: as for `load_bundle`; the teacher is loaded if one of the LoRAs makes students.
        loras: each as "file", "file:weight", a built-in name, or a `LoraFile`.
        steps: as for `load_bundle`, or the steps that the LoRA makes students for.
        embeddings: files and folders of textual inversions, for prompts to name, beside those in
            the files of the LoRAs; None leaves these out too. Text encoders that have some cannot
            be written.

    Raises ModelError for a model or a LoRA that cannot be had, ContractError for a LoRA that does
    not belong on the model.
    """
    files = [find_lora(lora) for lora in loras]
    has_few_steps = any(lora.makes_students for lora in files)
    bundle = load_bundle(model, steps=None if has_few_steps else steps)
    contract = bundle.contract
    for lora in files:
        contract = lora.contract_on(contract)
        merge_lora(lora.read(bundle.parts), bundle.parts, weight=lora.weight)
    if contract.role == "student" and steps not in (None, contract.steps):
        raise ModelError(f"{contract.name} draws in {contract.steps} steps, not in {steps}.")
    origin = (*bundle.origin, *map(spelled, loras))
    bundle = replace(bundle, contract=contract, origin=origin)
    if embeddings is None:
        return bundle
    return bundle.with_embeddings(all_embeddings(files, embeddings))
