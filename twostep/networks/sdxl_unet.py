"""The UNet of Stable Diffusion XL as a backbone.

This is the only file outside loading and adapters that knows what the layers of a UNet are called.
Architecture: section 2 of arXiv 2307.01952.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from twostep.diffusion.shapes import Latents
from twostep.networks import adapters
from twostep.networks.backbone import BackboneSpec
from twostep.networks.conditioning import Conditioning
from twostep.networks.control import residuals

Times = Shaped[Tensor, " batch"]
"""Times as the UNet reads them, one per item: 0 to 999."""


@dataclass(frozen=True, eq=False)
class SdxlUnet:
    """An SDXL-type UNet with what it is conditioned on: text, sizes, a mask and ControlNets.

    Args:
        network: The UNet, of diffusers or, where it only draws, a `LeanUnet`. It computes in the
            precision of its own weights.
    """

    network: Any

    @cached_property
    def spec(self) -> BackboneSpec:
        """The facts about this UNet, from its config."""
        config = self.network.config
        widths = tuple(config.block_out_channels)
        return BackboneSpec(
            family="sdxl",
            in_channels=int(config.in_channels),
            out_channels=int(config.out_channels),
            feature_widths=(*widths, widths[-1]),
            lora_targets=adapters.TARGETS,
            pooled_width=pooled_width_of(config),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are; diffusers' own `device` walks through all modules every time."""
        device: torch.device = self.network.conv_in.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        dtype: torch.dtype = self.network.conv_in.weight.dtype
        return dtype

    @property
    def is_inpainting(self) -> bool:
        """Whether the UNet takes a mask and known latents beside the noisy latents."""
        return self.spec.is_inpainting

    def __call__(self, x: Latents, time: Times, conditioning: Conditioning) -> Tensor:
        """Return the UNet's raw output [batch, out_channels, h, w].

        All ControlNets of the conditioning act; `Conditioning.acting_at` selects them before.
        """
        x = x.to(self.dtype)
        text = conditioning.text.to(self.dtype)
        embedded = _embedded_conditions(conditioning)
        controlled: dict[str, Any] = {}
        if conditioning.hints:
            controlled = residuals(conditioning.hints, x, time, text=text, embedded=embedded)
        if conditioning.known is not None:
            known = conditioning.known.to(x.dtype).expand(len(x), -1, -1, -1)
            x = torch.cat([x, known], dim=1)
        output: Tensor = self.network(
            x, time, text, added_cond_kwargs=embedded, return_dict=False, **controlled
        )[0]
        return output

    def features(
        self, x: Latents, time: Times, conditioning: Conditioning
    ) -> list[Float[Tensor, "batch width fh fw"]]:
        """Return the encoder's levels before each downsampling, and the mid-block's output last.

        Only the encoder and the mid-block compute, so the decoder need not exist. The widths are
        `spec.feature_widths`.
        """
        network = self.network
        x = x.to(self.dtype)
        text = conditioning.text.to(self.dtype)
        embedding = network.time_embedding(network.get_time_embed(sample=x, timestep=time))
        embedding = embedding + network.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=text,
            added_cond_kwargs=_embedded_conditions(conditioning),
        )
        hidden = network.conv_in(x)
        levels: list[Tensor] = []
        for block in network.down_blocks:
            if getattr(block, "has_cross_attention", False):
                hidden, states = block(hidden, embedding, encoder_hidden_states=text)
            else:
                hidden, states = block(hidden, embedding)
            # The last state of a block with a downsampler is the downsampled one.
            levels.append(states[-1] if block.downsamplers is None else states[-2])
        levels.append(network.mid_block(hidden, embedding, encoder_hidden_states=text))
        return levels

    def standalone(self, lora: str | None = None) -> SdxlUnet:
        """Return a float32 copy without LoRAs, the named one merged into the copy's weights."""
        return SdxlUnet(adapters.merge(self.network, lora))

    def encoder_copy(self, lora: str | None = None) -> SdxlUnet:
        """Return a copy without decoder, which only offers `features`."""
        copied = self.standalone(lora)
        del copied.network.up_blocks, copied.network.conv_norm_out, copied.network.conv_out
        return copied

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute blocks in the backward pass instead of keeping what is inside them.

        Saves memory and costs about a third more time.
        """
        if enabled:
            adapters.checkpoint_gradients(self.network)
        else:
            self.network.disable_gradient_checkpointing()


def pooled_width_of(config: Any) -> int:
    """Return the width of the pooled text that a UNet of this config takes; 0 for none."""
    if config.get("addition_embed_type") is None:
        return 0
    # What is left beside the embeddings of the six sizes.
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def _embedded_conditions(conditioning: Conditioning) -> dict[str, Tensor]:
    """Return what the UNet embeds with the time; it keeps the sizes exact, for it embeds them."""
    return {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
