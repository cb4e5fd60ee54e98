"""The family of Stable Audio: a diffusion transformer over the latents of an autoencoder of sounds.

A model folder is what diffusers saves of a `StableAudioPipeline`, Stable Audio Open 1.0 for
example, with a sampling contract in `twostep.json` where it was written here. Students lie in
`students/` as transformers by diffusers' names, and carry their contract in their metadata.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from twostep.contract import Contract
from twostep.diffusion import make_schedule
from twostep.formats.checkpoint import Checkpoint, student_path
from twostep.formats.locate import (
    CONTRACT_FILE,
    INDEX_FILE,
    ModelError,
    read_json,
)
from twostep.formats.single_file import account, folder_weights, read_tensors
from twostep.formats.stable_audio import (
    FAMILY,
    PARTS,
    SCHEDULER_CONFIG,
    check_parts,
    index_of,
    scheduler_config,
)
from twostep.media.oobleck import OobleckCodec
from twostep.models.bundle import Bundle
from twostep.models.family_files import expected_part, folder_of, write_file
from twostep.models.sdxl import clean_configs, in_half_precision
from twostep.networks.denoiser import Denoiser
from twostep.networks.stable_audio import StableAudioDit
from twostep.text.clip import quiet_transformers
from twostep.text.timed import BlankTokens, FilledTokens, TimedPrompts, Tokenizer
from twostep.training.halves import halved

_TRANSFORMER_CONFIG = "transformer/config.json"
_TOKENIZER_CONFIG = "tokenizer/tokenizer_config.json"
_MOST_TOKENS = 4096
"""A tokenizer that says a longer limit was saved without one."""

_TIED = {"text_encoder": {"encoder.embed_tokens.weight": "shared.weight"}}
"""T5 has its table of tokens by two names, and files by one."""

_PLURAL = "models of Stable Audio"
"""How messages call its models."""


class StableAudioFamily:
    """Loads and saves models of Stable Audio's classes."""

    name = FAMILY

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        """Load a model, or its student of so many steps, frozen and in float32.

        Arguments:
            checkpoint: a model folder, or a student's file in it.
            steps: picks the student; None is the model itself.
            outline: read configs alone, and leave the weights as they are initialised.

        Raises ModelError if a part is missing or damaged, or does not fit the others.
        """
        contract = checkpoint.contract_for(steps)
        folder = folder_of(checkpoint, contract, part=_TRANSFORMER_CONFIG, network="transformer")
        check_parts(folder.path)
        student = None
        if contract.role == "student":
            # An exported student is a folder of its own, with its network in the teacher's place.
            student = folder.students.get(contract.steps) if checkpoint.is_folder else checkpoint
        networks = {
            part: _load_part(
                folder.path, part, outline=outline, file=student if part == "transformer" else None
            )
            for part in PARTS
        }
        transformer = networks["transformer"]
        autoencoder = networks["vae"]
        longest = int(transformer.config.sample_size)
        schedule = make_schedule(**asdict(contract.schedule))
        return Bundle(
            denoiser=Denoiser(StableAudioDit(transformer), schedule, contract.prediction_type),
            codec=OobleckCodec(autoencoder, longest),
            text=TimedPrompts(
                _tokens(folder.path, outline=outline),
                networks["text_encoder"],
                networks["projection_model"],
                int(autoencoder.config.sampling_rate),
            ),
            contract=contract,
            students=tuple(sorted(folder.students, reverse=True)),
            origin=(checkpoint.name,),
        )

    def save(self, bundle: Bundle, folder: Path) -> None:
        """Write a model as diffusers does, in fp16, with its contract.

        `StableAudioPipeline` loads it. Raises ModelError for a bundle of another family's parts.
        """
        name = bundle.contract.name
        backbone = expected_part(bundle.denoiser.backbone, StableAudioDit, name, family=_PLURAL)
        codec = expected_part(bundle.codec, OobleckCodec, name, family=_PLURAL)
        text = expected_part(bundle.text, TimedPrompts, name, family=_PLURAL)
        tokens = expected_part(text.tokens, FilledTokens, name, family=_PLURAL)
        parts = {
            "transformer": backbone.network,
            "vae": codec.network,
            "text_encoder": text.encoder,
            "projection_model": text.projection,
        }
        # Part by part, for diffusers' scheduler cannot be made without torchsde, which its random
        # steps take.
        scheduler = scheduler_config(bundle.contract)
        with quiet_transformers():
            for part, network in parts.items():
                in_half_precision(network).save_pretrained(folder / part)
            tokens.to_save().save_pretrained(folder / "tokenizer")
        clean_configs(folder)
        _write_json(folder / "scheduler" / SCHEDULER_CONFIG, scheduler)
        _write_json(folder / INDEX_FILE, index_of(type(tokens.tokenizer).__name__))
        write_file(folder / CONTRACT_FILE, bundle.contract.to_json().encode())

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        """Write a student's transformer in fp16 into the folder of its teacher; returns the file.

        Its weights have diffusers' names.
        """
        path = student_path(contract, folder)
        write_file(path, save(halved(weights), {"format": "pt", **contract.to_metadata()}))
        return path


def _load_part(folder: Path, part: str, *, outline: bool, file: Checkpoint | None) -> Any:
    """Load a network of a model folder, frozen and in float32.

    Arguments:
        folder: the model folder.
        part: one of `PARTS`.
        outline: leave the weights as they are initialised.
        file: where its weights lie if not in the folder.
    """
    config = read_json(folder / part / "config.json")
    # Without gradients, or the weights that the autoencoder makes of lengths and directions when
    # it is built could not be copied.
    with warnings.catch_warnings(), torch.no_grad(), torch.device("cpu" if outline else "meta"):
        warnings.filterwarnings("ignore", message=".*weight_norm. is deprecated")
        network = _build(config, part, folder)
    if not outline:
        if file is None:
            weights = folder_weights(folder / part, network, torch.float32, _TIED.get(part))
        else:
            expected = network.state_dict()
            read = read_tensors(file.path, file.file.shapes, torch.float32)
            weights = account(read, expected, {key: key for key in expected}, str(file.path))
        network.load_state_dict(weights, assign=True)
    if part == "text_encoder":
        # One table again, not two that hold the same.
        network.encoder.embed_tokens = network.shared
    return network.eval().requires_grad_(False)


def _build(config: dict[str, Any], part: str, folder: Path) -> Any:
    """Make a network by its config; ModelError where that says what cannot be made."""
    try:
        if part == "text_encoder":
            from transformers import T5Config, T5EncoderModel

            return T5EncoderModel(T5Config.from_dict(config))
        import diffusers

        return getattr(diffusers, PARTS[part]).from_config(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{folder / part / 'config.json'} is damaged ({error}). Fetch that model again."
        ) from error


def _tokens(folder: Path, *, outline: bool) -> Tokenizer:
    """Return what makes tokens of prompts, of an outline no more than as many."""
    config = read_json(folder / _TOKENIZER_CONFIG)
    longest = config.get("model_max_length")
    if not isinstance(longest, int) or not 1 <= longest <= _MOST_TOKENS:
        raise ModelError(
            f"{folder / _TOKENIZER_CONFIG} has model_max_length = {longest!r}; expected how many "
            f"tokens prompts are filled up to, at most {_MOST_TOKENS}: 128 in Stable Audio Open."
        )
    if outline:
        return BlankTokens(longest)
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return FilledTokens(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{folder / 'tokenizer'} cannot be read ({str(error).splitlines()[0]}). Fetch that "
            "model again."
        ) from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_file(path, json.dumps(values, indent=2).encode())
