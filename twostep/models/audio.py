"""The family of sounds: a diffusion transformer over log-mel spectrograms, by rectified flow.

A model folder holds the contract in `twostep.json`, all sizes and the vocabulary in `config.json`,
the network in `network.safetensors` and what makes its latents in `codec.safetensors`. Students lie
in `students/` and carry their contract in the metadata of their file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from twostep.contract import Contract
from twostep.diffusion import make_schedule
from twostep.formats.checkpoint import Checkpoint, student_path
from twostep.formats.locate import CONTRACT_FILE, ModelError, read_json
from twostep.media.audio import AudioCodec, BlockComponents
from twostep.media.spectrogram import Spectrogram
from twostep.models.bundle import Bundle
from twostep.models.family_files import expected_part, folder_of, write_file
from twostep.networks.audio_dit import AudioDit, AudioDitConfig
from twostep.networks.denoiser import Denoiser
from twostep.text.attributes import AttributePrompts
from twostep.training.halves import halved

CONFIG_FILE = "config.json"
NETWORK_FILE = "network.safetensors"
CODEC_FILE = "codec.safetensors"

FAMILY = "nano-audio"
"""The name of the family in contracts."""

_PLURAL = "models of sounds"
"""How messages call its models."""


class AudioFamily:
    """Loads and saves models of sounds."""

    name = FAMILY

    def load(
        self, checkpoint: Checkpoint, *, steps: int | None = None, outline: bool = False
    ) -> Bundle:
        """Load a model, or its student of so many steps, frozen and in float32.

        Arguments:
            checkpoint: a model folder, or a student's file in it.
            steps: picks the student; None is the model itself.
            outline: read configs alone, and leave the weights as they are initialised.

        Raises ModelError if weights or configs are missing or damaged.
        """
        contract = checkpoint.contract_for(steps)
        folder = folder_of(checkpoint, contract, part=CONFIG_FILE, network="network")
        file = folder.path / NETWORK_FILE
        if contract.role == "student":
            student = folder.students.get(contract.steps) if checkpoint.is_folder else checkpoint
            # An exported student is a folder of its own, with its network in the teacher's place.
            file = file if student is None else student.path
        config = read_json(folder.path / CONFIG_FILE)
        try:
            network = AudioDit(AudioDitConfig(**config["network"]))
            components = BlockComponents(**config["codec"])
            spectrogram = Spectrogram(**config["spectrogram"])
            text = AttributePrompts(tuple(config["vocabulary"]), dict(config["synonyms"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"{folder.path / CONFIG_FILE} is damaged ({error!r}). Fetch that model again."
            ) from error
        if not outline:
            _read_weights(network, file)
            _read_weights(components, folder.path / CODEC_FILE)
        for module in (network, components):
            module.eval().requires_grad_(False)
        schedule = make_schedule(**asdict(contract.schedule))
        return Bundle(
            denoiser=Denoiser(network, schedule, contract.prediction_type),
            codec=AudioCodec(components, spectrogram),
            text=text,
            contract=contract,
            students=tuple(sorted(folder.students, reverse=True)),
            origin=(checkpoint.name,),
        )

    def save(self, bundle: Bundle, folder: Path) -> None:
        """Write a model folder; raises ModelError for a bundle of another family's parts."""
        name = bundle.contract.name
        network = expected_part(bundle.denoiser.backbone, AudioDit, name, family=_PLURAL)
        codec = expected_part(bundle.codec, AudioCodec, name, family=_PLURAL)
        text = expected_part(bundle.text, AttributePrompts, name, family=_PLURAL)
        components = codec.network
        config = {
            "network": asdict(network.config),
            "codec": {
                "bands": components.bands,
                "frames": components.frames,
                "components": components.components,
            },
            "spectrogram": asdict(codec.spectrogram),
            "vocabulary": text.vocabulary,
            "synonyms": dict(text.synonyms),
        }
        write_file(folder / NETWORK_FILE, save(halved(network.state_dict())))
        # In full precision: it is small, and latents that were cached depend on it.
        write_file(folder / CODEC_FILE, save(components.state_dict()))
        write_file(folder / CONFIG_FILE, json.dumps(config, indent=2).encode())
        write_file(folder / CONTRACT_FILE, bundle.contract.to_json().encode())

    def save_student(self, weights: Mapping[str, Tensor], contract: Contract, folder: Path) -> Path:
        """Write a student's network in fp16 into the folder of its teacher; returns the file."""
        path = student_path(contract, folder)
        write_file(path, save(halved(weights), contract.to_metadata()))
        return path


def _read_weights(module: nn.Module, path: Path) -> None:
    """Read a module's weights; ModelError if they are missing, damaged or another module's."""
    try:
        weights = load_file(path)
        module.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path} cannot be loaded ({reason}). Fetch that model again.") from error
