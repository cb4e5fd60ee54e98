"""SDXL's autoencoder and the small ones (TAESD), with the weights' names of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from twostep.diffusion.shapes import Latents
from twostep.networks.lean.blocks import Attention, Downsample, Resnet, Upsample
from twostep.networks.lean.config import LeanNetwork, has_entries

_EPS = 1e-6


class Encoded(NamedTuple):
    """What an encoder gives: latents, unscaled; of a variational autoencoder the mean of each."""

    latents: Tensor


class Decoded(NamedTuple):
    """What a decoder gives: pictures around -1..1."""

    sample: Tensor


class TinyAutoencoder(LeanNetwork):
    """An autoencoder of 3x3 convolutions alone (https://github.com/madebyollin/taesd).

    Args:
        config: As diffusers writes it of an `AutoencoderTiny`; `fits` must say yes to it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        widths = list(config["decoder_block_out_channels"])
        super().__init__({**config, "block_out_channels": widths})
        entries = self.config
        self.encoder = TinyEncoder(
            entries.in_channels,
            entries.encoder_block_out_channels,
            entries.num_encoder_blocks,
            entries.latent_channels,
        )
        self.decoder = TinyDecoder(
            entries.latent_channels,
            widths,
            entries.num_decoder_blocks,
            entries.out_channels,
        )

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Tell whether a config asks for nothing but what this class does."""
        expected = {
            "act_fn": "relu",
            "upsample_fn": (None, "nearest"),
            "upsampling_scaling_factor": (None, 2),
        }
        has_even_widths = all(
            len(set(config.get(f"{name}_block_out_channels", ()))) == 1
            for name in ("encoder", "decoder")
        )
        return has_entries(config, expected) and has_even_widths

    def encode(self, x: Latents) -> Encoded:
        """Return the latents of pictures in -1..1."""
        return Encoded(self.encoder(x))

    def decode(self, z: Latents) -> Decoded:
        """Return the pictures of latents."""
        return Decoded(self.decoder(z))


class TinyBlock(nn.Module):
    """Three convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Latents) -> Tensor:
        """Return features of the same shape."""
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """From pictures to latents."""

    def __init__(
        self, width_in: int, widths: Sequence[int], counts: Sequence[int], width_out: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
            if level == 0:
                layers.append(nn.Conv2d(width_in, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers += [TinyBlock(width) for _ in range(count)]
        layers.append(nn.Conv2d(widths[-1], width_out, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Latents) -> Tensor:
        """Return the latents of pictures in -1..1, which the layers know in 0..1."""
        latents: Tensor = self.layers(x.add(1).div(2))
        return latents


class TinyDecoder(nn.Module):
    """From latents to pictures."""

    def __init__(
        self, width_in: int, widths: Sequence[int], counts: Sequence[int], width_out: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(width_in, widths[0], 3, padding=1), nn.ReLU()]
        for width, count in zip(widths[:-1], counts[:-1], strict=True):
            layers += [TinyBlock(width) for _ in range(count)]
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers += [TinyBlock(widths[-1]) for _ in range(counts[-1])]
        layers.append(nn.Conv2d(widths[-1], width_out, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Latents) -> Tensor:
        """Return pictures around -1..1; latents are bent softly into -3..3 before."""
        pictures: Tensor = self.layers(torch.tanh(z / 3) * 3)
        return pictures.mul(2).sub(1)


class KlAutoencoder(LeanNetwork):
    """A variational autoencoder, of which only the means are used (arXiv 2112.10752).

    Args:
        config: As diffusers writes it of an `AutoencoderKL`; `fits` must say yes to it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        entries = self.config
        widths = list(entries.block_out_channels)
        shape = (widths, entries.layers_per_block, entries.norm_num_groups)
        channels = entries.latent_channels
        self.encoder = KlEncoder(entries.in_channels, *shape, 2 * channels)
        self.decoder = KlDecoder(channels, *shape, entries.out_channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Tell whether a config asks for nothing but what this class does."""
        blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
        expected = {
            "act_fn": "silu",
            "mid_block_add_attention": (None, True),
            "use_quant_conv": (None, True),
            "use_post_quant_conv": (None, True),
        }
        numbers = ("layers_per_block", "norm_num_groups", "latent_channels")
        return (
            has_entries(config, expected)
            and blocks == {"DownEncoderBlock2D", "UpDecoderBlock2D"}
            and all(isinstance(config.get(number), int) for number in numbers)
        )

    def encode(self, x: Latents) -> Encoded:
        """Return the mean latents of pictures in -1..1."""
        mean, _ = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Encoded(mean)

    def decode(self, z: Latents) -> Decoded:
        """Return the pictures of latents."""
        return Decoded(self.decoder(self.post_quant_conv(z)))


class KlLevel(nn.Module):
    """One size of the picture; the last layer changes it, where there is one."""

    def __init__(self, steps: Sequence[int], groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(*step, groups=groups, eps=_EPS, time_width=None) for step in pairwise(steps)
        )

    def forward(self, x: Latents) -> Tensor:
        """Return features at the next size."""
        for resnet in self.resnets:
            x = resnet(x)
        for name in ("downsamplers", "upsamplers"):
            for layer in getattr(self, name, ()):
                x = layer(x)
        return x


class KlAttention(Attention):
    """Attention of the positions of a picture to each other, beside them."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=_EPS)

    def forward(self, x: Latents) -> Tensor:  # type: ignore[override]
        """Return features of the same shape."""
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)
        return super().forward(tokens).transpose(1, 2).reshape(x.shape) + x


class KlMiddle(nn.Module):
    """The middle, at the smallest size."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(width, width, groups=groups, eps=_EPS, time_width=None) for _ in range(2)
        )
        self.attentions = nn.ModuleList([KlAttention(width, groups)])

    def forward(self, x: Latents) -> Tensor:
        """Return features of the same shape."""
        first, second = self.resnets
        out: Tensor = second(self.attentions[0](first(x)))
        return out


class KlEncoder(nn.Module):
    """From pictures to means and logarithms of variances."""

    def __init__(
        self, width_in: int, widths: Sequence[int], count: int, groups: int, width_out: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(width_in, widths[0], 3, padding=1)
        levels: list[KlLevel] = []
        for before, width in pairwise([widths[0], *widths]):
            level = KlLevel([before, *[width] * count], groups)
            if len(levels) + 1 < len(widths):
                level.downsamplers = nn.ModuleList([Downsample(width, padding=None)])
            levels.append(level)
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = KlMiddle(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], width_out, 3, padding=1)

    def forward(self, x: Latents) -> Tensor:
        """Return the moments [batch, 2 channels, h, w] of pictures in -1..1."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        out: Tensor = self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))
        return out


class KlDecoder(nn.Module):
    """From latents to pictures."""

    def __init__(
        self, width_in: int, widths: Sequence[int], count: int, groups: int, width_out: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(width_in, widths[-1], 3, padding=1)
        self.mid_block = KlMiddle(widths[-1], groups)
        levels: list[KlLevel] = []
        for before, width in pairwise([widths[-1], *reversed(widths)]):
            level = KlLevel([before, *[width] * (count + 1)], groups)
            if len(levels) + 1 < len(widths):
                level.upsamplers = nn.ModuleList([Upsample(width)])
            levels.append(level)
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[0], width_out, 3, padding=1)

    def forward(self, z: Latents) -> Tensor:
        """Return pictures around -1..1."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(silu(self.conv_norm_out(x)))
        return out
