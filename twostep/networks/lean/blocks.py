"""The blocks that UNets and autoencoders of SDXL consist of.

Attributes have the names that the weights have in files, and LoRAs call the layers by.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import gelu, interpolate, pad, silu

from twostep.diffusion.shapes import Latents
from twostep.networks.recomputing import computed

Tokens = Float[Tensor, "batch tokens width"]
"""Vectors of tokens, or of the positions of a picture in rows."""


class Resnet(nn.Module):
    """Two convolutions beside a shortcut, with the time added between them where there is one.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output.
        groups: Of the norms.
        eps: Of the norms.
        time_width: Of the time's embedding; None without a time.
    """

    def __init__(
        self, width_in: int, width_out: int, *, groups: int, eps: float, time_width: int | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=eps)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.time_emb_proj = None if time_width is None else nn.Linear(time_width, width_out)
        self.norm2 = nn.GroupNorm(groups, width_out, eps=eps)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = None if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Latents, time: Tensor | None = None) -> Tensor:
        """Return the features [batch, width_out, h, w]."""
        hidden = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(silu(time))[:, :, None, None]
        hidden = self.conv2(silu(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = shortcut + hidden
        return out


class Attention(nn.Module):
    """Attention with several heads (arXiv 1706.03762).

    Args:
        width: Of the vectors that ask.
        num_heads: Heads, among which the width is divided.
        context_width: Of the vectors that are asked; None where they are the same.
        bias: Whether queries, keys and values have one.
    """

    def __init__(
        self, width: int, num_heads: int, *, context_width: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width or width, width, bias=bias)
        self.to_v = nn.Linear(context_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tokens, context: Tensor | None = None) -> Tensor:
        """Return what `x` sees in the context [batch, others, context width], or in itself."""
        context = x if context is None else context
        heads = (self._heads(self.to_q(x)), self._heads(self.to_k(context)))
        seen = functional.scaled_dot_product_attention(*heads, self._heads(self.to_v(context)))
        joined = seen.transpose(1, 2).reshape(x.shape)
        answer: Tensor = self.to_out[0](joined)
        return answer

    def _heads(self, vectors: Tensor) -> Tensor:
        """Return vectors as [batch, heads, tokens, width of a head]."""
        batch, _, width = vectors.shape
        return vectors.view(batch, -1, self.num_heads, width // self.num_heads).transpose(1, 2)


class GatedLinear(nn.Module):
    """Half of a linear layer's output times GELU of the other half (arXiv 2002.05202)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, 2 * width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated vectors [batch, tokens, width_out]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        gated: Tensor = value * gelu(gate)
        return gated


class FeedForward(nn.Module):
    """Two layers of each position by itself, four times as wide between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        self.net = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of the same width."""
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Attention to itself, attention to the text, and two layers, each beside what came in."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn1 = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.attn2 = Attention(width, num_heads, context_width=context_width)
        self.norm3 = nn.LayerNorm(width, eps=1e-5)
        self.ff = FeedForward(width)

    def forward(self, x: Tokens, text: Tensor) -> Tensor:
        """Return vectors of the same width, for a text [batch, tokens, context width]."""
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), text) + x
        out: Tensor = self.ff(self.norm3(x)) + x
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks on the positions of a picture.

    Args:
        width: Channels.
        num_heads: Of each attention.
        depth: Number of blocks.
        context_width: Of the text.
        groups: Of the norm before them.
        is_linear: Whether the layers around them are linear, or convolutions of 1x1.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        depth: int,
        *,
        context_width: int,
        groups: int,
        is_linear: bool,
    ) -> None:
        super().__init__()
        self.is_linear = is_linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in: nn.Module = nn.Linear(width, width) if is_linear else _pointwise(width)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, num_heads, context_width) for _ in range(depth)]
        )
        self.proj_out: nn.Module = nn.Linear(width, width) if is_linear else _pointwise(width)

    def forward(self, x: Latents, text: Tensor, recompute: bool = False) -> Tensor:
        """Return features of the same shape; blocks may be computed again going back."""
        hidden = self.norm(x)
        hidden = (
            self.proj_in(_as_tokens(hidden)) if self.is_linear else _as_tokens(self.proj_in(hidden))
        )
        for block in self.transformer_blocks:
            hidden = computed(block, recompute, hidden, text)
        if self.is_linear:
            return _as_picture(self.proj_out(hidden), x) + x
        out: Tensor = self.proj_out(_as_picture(hidden, x)) + x
        return out


class Downsample(nn.Module):
    """A convolution that halves the sides.

    Args:
        width: Channels.
        padding: Around the picture; None pads on its right and its bottom alone.
    """

    def __init__(self, width: int, *, padding: int | None) -> None:
        super().__init__()
        self.is_one_sided = padding is None
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding or 0)

    def forward(self, x: Latents) -> Tensor:
        """Return features at half the sides."""
        out: Tensor = self.conv(pad(x, (0, 1, 0, 1)) if self.is_one_sided else x)
        return out


class Upsample(nn.Module):
    """Every position four times, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Latents, size: torch.Size | None = None) -> Tensor:
        """Return features at twice the sides, or at the size (h, w) that is given."""
        if size is None:
            larger = interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            larger = interpolate(x, size=size, mode="nearest")
        out: Tensor = self.conv(larger)
        return out


def _pointwise(width: int) -> nn.Conv2d:
    return nn.Conv2d(width, width, 1)


def _as_tokens(picture: Tensor) -> Tensor:
    """Return [batch, h w, channels] of [batch, channels, h, w]."""
    batch, channels, height, width = picture.shape
    return picture.permute(0, 2, 3, 1).reshape(batch, height * width, channels)


def _as_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """Return [batch, channels, h, w] of [batch, h w, channels], at the size of a picture."""
    batch, channels, height, width = like.shape
    picture = tokens.reshape(batch, height, width, channels).permute(0, 3, 1, 2)
    return picture.contiguous()
