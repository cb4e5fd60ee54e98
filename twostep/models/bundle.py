"""A model that is ready to sample: denoiser, codec, text encoders, and its sampling contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from twostep.contract import Contract
from twostep.formats.embeddings import Embedding
from twostep.formats.locate import ModelError
from twostep.formats.lora_files import PICTURES
from twostep.media.codec import Codec, HasTinyDecoder
from twostep.models.runtime import Runtime
from twostep.networks.backbone import HasFrozen
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser


@runtime_checkable
class PromptEncoder(Protocol):
    """What makes conditioning of prompts: SDXL's two CLIP encoders, or those of another family."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The encoders' networks by their names in a model folder."""

    def with_networks(self, networks: Mapping[str, Any]) -> PromptEncoder:
        """Return the same with other networks; more may be given than its own."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of prompts, and their pooled embeddings."""

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Return what the network is given for prompts and a size in pixels."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that are not in the vocabulary."""


@runtime_checkable
class TakesEmbeddings(Protocol):
    """A prompt encoder that textual inversions can be given to."""

    def with_embeddings(self, embeddings: Sequence[Embedding]) -> PromptEncoder:
        """Return the same with words for textual inversions."""


@runtime_checkable
class Remembers(Protocol):
    """A prompt encoder that can keep what it encoded for the next time."""

    def remembering(self) -> PromptEncoder:
        """Return the same with a memory; its weights must not change any more."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """Everything that sampling needs.

    `students` are the step counts of the students that lie in the same folder. `origin` is the
    model, followed by its LoRAs, as they were named when it was loaded. `runtime` is what runs its
    networks. `learnt_words` are those that its networks know although the vocabulary of the text
    encoders holds them only in pieces.
    """

    denoiser: Denoiser
    codec: Codec
    text: PromptEncoder
    contract: Contract
    students: tuple[int, ...] = ()
    origin: tuple[str, ...] = ()
    runtime: Runtime = field(default_factory=Runtime)
    learnt_words: frozenset[str] = frozenset()

    def conditioning(
        self, prompts: Sequence[str], width: int, height: int, *, whole: bool = False
    ) -> Conditioning:
        """Encode prompts for uncropped pictures of this size in pixels.

        With `whole`, weights in the prompts count, and what is longer than the encoders' limit is
        not cut off.
        """
        return self.text.conditioning(prompts, width, height, whole=whole)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the words of a prompt that neither the vocabulary holds nor a network learnt."""
        return [word for word in self.text.unknown_words(prompt) if word not in self.learnt_words]

    @property
    def is_inpainting(self) -> bool:
        """Whether the network also takes a mask, and the latents of what is not masked."""
        return self.denoiser.backbone.spec.is_inpainting

    def as_teacher(self) -> Bundle:
        """Return the bundle if something can be distilled from it; raises ModelError if not."""
        if self.is_inpainting:
            raise ModelError(
                f"{self.contract.name} has an inpainting UNet, which is no teacher here: distil "
                "its base."
            )
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks that a LoRA may change, by the names that diffusers gives them.

        The frozen network that draws, where there is one, is `PICTURES`.
        """
        network, *frozen = self.denoiser.networks
        pictures = {PICTURES: frozen[0]} if frozen else {}
        return {"unet": network, **pictures, **self.text.networks}

    @property
    def networks(self) -> list[nn.Module]:
        """All networks there are, a tiny decoder too."""
        frozen = self.denoiser.networks[2:]
        return [*self.parts.values(), *frozen, *modules_of(self.codec), *_tiny_of(self.codec)]

    def with_parts(self, parts: Mapping[str, nn.Module]) -> Bundle:
        """Return the bundle with other networks in the place of its own, all of `parts`."""
        denoiser = self.denoiser.with_network(parts["unet"])
        backbone = denoiser.backbone
        if isinstance(backbone, HasFrozen):
            changed = backbone.with_frozen([parts[PICTURES], *backbone.frozen[1:]])
            denoiser = replace(denoiser, backbone=changed)
        return replace(self, denoiser=denoiser, text=self.text.with_networks(parts))

    def with_embeddings(self, embeddings: Sequence[Embedding]) -> Bundle:
        """Return the bundle with textual inversions, whose names then stand for them in prompts.

        Raises ModelError for a model whose text encoders take none, or that has some already.
        """
        if not embeddings:
            return self
        if not isinstance(self.text, TakesEmbeddings):
            raise ModelError(
                f"{self.contract.name} has {type(self.text).__name__}, which takes no textual "
                "inversions."
            )
        return replace(self, text=self.text.with_embeddings(embeddings))

    def remembering(self) -> Bundle:
        """Return the bundle with a memory of prompts, if its prompt encoder can have one.

        For bundles whose text encoders do not change any more.
        """
        if not isinstance(self.text, Remembers):
            return self
        return replace(self, text=self.text.remembering())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Bundle:
        """Move every network to a device, in place, and to a precision if one is given.

        Returns the bundle.
        """
        for network in self.networks:
            nn.Module.to(network, device, dtype)  # diffusers' own method would warn of nothing
        return self

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Return the shape of one item's latents, of a picture (channels, height, width)."""
        return tuple(self.codec.latent_shape(width, height))


def modules_of(codec: object) -> list[nn.Module]:
    """Return the networks of a codec: itself, or those among its fields, or of a codec in these.

    A tiny decoder is none of them: what a codec's latents are does not depend on it.
    """
    if isinstance(codec, nn.Module):
        return [codec]
    modules: list[nn.Module] = []
    for value in getattr(codec, "__dict__", {}).values():
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, Codec):
            modules += modules_of(value)
    return modules


def _tiny_of(codec: object) -> list[nn.Module]:
    if isinstance(codec, HasTinyDecoder) and codec.tiny is not None:
        return [codec.tiny.network]
    return []
