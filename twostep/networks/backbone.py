"""What a denoiser needs of a network, whatever the network's architecture.

A backbone is a network that maps noisy latents, a time and conditioning to an output, together
with the facts that the rest of the package may ask about it. Training, adapters, samplers and
exporters go through this module, so they work for any architecture. Names of layers stay inside
the backbone's own file.

A backbone is an `nn.Module` itself, or a dataclass with a field `network` that holds one.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Shaped
from torch import Tensor, nn

from twostep.diffusion.shapes import Batch
from twostep.errors import TwostepError
from twostep.networks.conditioning import Conditioning


class BackboneError(TwostepError):
    """An operation that a backbone does not offer."""


@dataclass(frozen=True)
class BackboneSpec:
    """The facts about a backbone that do not depend on its weights.

    Args:
        family: The model family, "sdxl" for example. A contract names the family that loads it.
        in_channels: Channels of the network's input, those of an inpainting mask included.
        out_channels: Channels of the network's output, which are those of the latents.
        latent_ndim: Dimensions of one item's latents: 3 for pictures (channels, height, width).
        feature_widths: Channels of every tensor that `features` returns; empty without features.
        feature_sides: Sides of these tensors beside the channels: 2 for height and width.
        lora_targets: Endings of the names of the layers that a LoRA changes; empty where the
            backbone takes no LoRA.
        pooled_width: Width of the pooled embedding of a prompt; 0 where there is none.
    """

    family: str
    in_channels: int
    out_channels: int
    latent_ndim: int = 3
    feature_widths: tuple[int, ...] = ()
    feature_sides: int = 2
    lora_targets: tuple[str, ...] = ()
    pooled_width: int = 0

    @property
    def is_inpainting(self) -> bool:
        """Whether the network takes a mask and known latents beside the noisy latents."""
        return self.in_channels != self.out_channels


@runtime_checkable
class Backbone(Protocol):
    """A network that a `Denoiser` can call.

    One call must be one graph for `torch.compile` and for exporters. It takes no lock, reads no
    value out of a tensor and does not branch on one: what acts at which time is decided before.
    """

    @property
    def spec(self) -> BackboneSpec:
        """The facts about the network that do not depend on its weights."""

    def __call__(
        self, x: Batch, time: Shaped[Tensor, " batch"], conditioning: Conditioning
    ) -> Tensor:
        """Return the raw output for noisy latents `x`.

        Args:
            x: Noisy latents in any floating-point precision, on the network's device.
            time: The time as the network was trained to read it (`Schedule.network_time`), on the
                network's device.
            conditioning: What the latents are to show.
        """


@runtime_checkable
class HasFeatures(Protocol):
    """A backbone whose encoder can be used by itself, as a discriminator does."""

    def features(
        self, x: Batch, time: Shaped[Tensor, " batch"], conditioning: Conditioning
    ) -> list[Tensor]:
        """Return the output of every encoder level, shallow to deep, and of the mid-block last."""


@runtime_checkable
class HasEncoder(Protocol):
    """A backbone that can be copied without the decoder, which `features` does not need."""

    def encoder_copy(self, lora: str | None = None) -> Backbone:
        """Return a copy that offers `features` alone, with the named LoRA merged in."""


@runtime_checkable
class TakesLora(Protocol):
    """A backbone that can carry LoRAs beside its weights."""

    def standalone(self, lora: str | None = None) -> Backbone:
        """Return a float32 copy without LoRAs, the named one merged into the copy's weights."""


@runtime_checkable
class Checkpoints(Protocol):
    """A backbone that can recompute activations in the backward pass instead of keeping them."""

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Switch gradient checkpointing on or off."""


@runtime_checkable
class HasFrozen(Protocol):
    """A backbone that computes with further networks, which are never trained nor copied.

    Where there are several of one kind, `Conditioning.variants` says which an item is for. The
    first draws.
    """

    @property
    def frozen(self) -> Sequence[nn.Module]:
        """The further networks."""

    def with_frozen(self, networks: Sequence[Any]) -> Backbone:
        """Return the same with others in their place, as many."""


def module_of(backbone: Backbone) -> nn.Module:
    """Return the module that holds a backbone's weights: the backbone itself, or its `network`."""
    if isinstance(backbone, nn.Module):
        return backbone
    network = getattr(backbone, "network", None)
    if not isinstance(network, nn.Module):
        raise BackboneError(
            f"{type(backbone).__name__} is no nn.Module and has no field `network` that is one. "
            "Derive the backbone from nn.Module, or keep its module in that field."
        )
    return network


def modules_of(backbone: Backbone) -> list[nn.Module]:
    """Return all networks of a backbone: the one that can be trained first, then the frozen."""
    frozen = backbone.frozen if isinstance(backbone, HasFrozen) else ()
    return [module_of(backbone), *frozen]


def num_variants(backbone: Backbone) -> int:
    """Return how many frozen networks an item of a batch may be for; 1 where there are none."""
    return len(backbone.frozen) if isinstance(backbone, HasFrozen) else 1


def with_module(backbone: Backbone, network: Any) -> Backbone:
    """Return the same backbone on another module of the same architecture."""
    if isinstance(backbone, nn.Module):
        return network  # type: ignore[no-any-return]
    replaced: Backbone = dataclasses.replace(backbone, network=network)  # type: ignore[type-var]
    return replaced


def standalone(backbone: Backbone, lora: str | None = None) -> Backbone:
    """Return a float32 copy that shares no weights and carries no LoRA.

    The named LoRA is merged into the copy. Raises BackboneError if the backbone takes no LoRA.
    """
    if isinstance(backbone, TakesLora):
        return backbone.standalone(lora)
    if lora is not None:
        raise BackboneError(
            f"{type(backbone).__name__} takes no LoRA, so {lora!r} cannot be merged into it. "
            "Give the backbone a method `standalone(lora)`, or train the whole network."
        )
    copied = copy.deepcopy(backbone)
    module_of(copied).float()
    return copied


def encoder_copy(backbone: Backbone, lora: str | None = None) -> Backbone:
    """Return a copy for `features` alone, without the decoder if the backbone can leave it out.

    The named LoRA is merged into the copy.
    """
    if isinstance(backbone, HasEncoder):
        return backbone.encoder_copy(lora)
    return standalone(backbone, lora)


def checkpoint_gradients(backbone: Backbone, enabled: bool) -> None:
    """Switch gradient checkpointing on or off; BackboneError where it cannot be switched on."""
    if isinstance(backbone, Checkpoints):
        backbone.checkpoint_gradients(enabled)
    elif enabled:
        raise BackboneError(
            f"{type(backbone).__name__} has no gradient checkpointing. Set "
            "gradient_checkpointing = false, or give the backbone a method `checkpoint_gradients`."
        )


def features(
    backbone: Backbone, x: Batch, time: Shaped[Tensor, " batch"], conditioning: Conditioning
) -> list[Tensor]:
    """Return a backbone's features; BackboneError if it has none."""
    if not isinstance(backbone, HasFeatures):
        raise BackboneError(
            f"{type(backbone).__name__} has no method `features`, which a discriminator needs. "
            "Use a method without a discriminator, or add it: see docs/extending.md."
        )
    return backbone.features(x, time, conditioning)
