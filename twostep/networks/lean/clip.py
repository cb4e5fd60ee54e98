"""CLIP's text encoder (arXiv 2103.00020) with the weights' names of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import gelu
from torch.utils import _pytree as pytree

from twostep.networks.lean.config import LeanNetwork, has_entries

TokenIds = Int[Tensor, "batch tokens"]
"""The numbers of tokens."""

_ACTIVATIONS = ("quick_gelu", "gelu")


class ClipOutput(NamedTuple):
    """What an encoder makes of prompts, in the order in which transformers has it.

    Attributes:
        pooled: One vector per prompt [batch, width], projected where the encoder has a projection.
        hidden_states: The vectors of tokens [batch, tokens, width] before and after every layer.
    """

    pooled: Tensor
    hidden_states: tuple[Tensor, ...]


# So that graphs of engines can say how their answers are put together.
pytree._register_namedtuple(ClipOutput, serialized_type_name="twostep.ClipOutput")


class LeanClip(LeanNetwork):
    """A text encoder that computes what transformers' computes.

    Args:
        config: As transformers writes it; `fits` must say yes to it.
        is_projected: Whether it is the encoder with a projection, SDXL's second.
    """

    def __init__(self, config: Mapping[str, Any], *, is_projected: bool) -> None:
        super().__init__(config)
        stack: nn.Module = ClipStack(self.config)
        if is_projected:
            self.text_model = stack
            width = self.config.hidden_size
            self.text_projection = nn.Linear(width, self.config.projection_dim, bias=False)
        else:
            # Its weights have the names of the stack itself.
            self._modules.update(stack._modules)
        self.is_projected = is_projected
        self.eos_token_id = int(self.config.eos_token_id)

    @staticmethod
    def fits(config: Mapping[str, Any]) -> bool:
        """Tell whether a config asks for nothing but what this class does."""
        numbers = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        known = all(isinstance(config.get(number), int) for number in numbers)
        return known and has_entries(
            config, {"hidden_act": _ACTIVATIONS, "quantization_config": None}
        )

    def get_input_embeddings(self) -> nn.Module:
        """Return the table of token vectors."""
        table: nn.Module = self._stack.embeddings.token_embedding
        return table

    def set_input_embeddings(self, table: nn.Module) -> None:
        """Put another table of token vectors in."""
        self._stack.embeddings.token_embedding = table

    @property
    def _stack(self) -> Any:
        return self.text_model if self.is_projected else self

    def forward(
        self,
        input_ids: TokenIds,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool = True,
        return_dict: bool = True,
    ) -> ClipOutput:
        """Encode tokens.

        Args:
            input_ids: The tokens.
            attention_mask: 0 for tokens that nobody may look at [batch, tokens]; None for none.
            output_hidden_states: True, as transformers' callers say it: they are always there.
            return_dict: The same.
        """
        stack = self._stack
        tokens = input_ids.shape[1]
        x = stack.embeddings.token_embedding(input_ids)
        x = x + stack.embeddings.position_embedding.weight[:tokens]
        mask = None
        if attention_mask is not None:
            earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
            mask = earlier & attention_mask[:, None, None, :].bool()
        states = [x]
        for layer in stack.encoder.layers:
            x = layer(x, mask)
            states.append(x)
        pooled = self._pooled(stack.final_layer_norm(x), input_ids)
        return ClipOutput(pooled, tuple(states))

    def _pooled(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Return the vector at each prompt's end, projected."""
        if self.eos_token_id == 2:
            # As configs of CLIP's first years have it: the end has the largest number.
            places = input_ids.to(torch.int).argmax(dim=-1)
        else:
            places = (input_ids == self.eos_token_id).int().argmax(dim=-1)
        pooled = x[torch.arange(len(x), device=x.device), places]
        if self.is_projected:
            pooled = self.text_projection(pooled)
        return pooled


class ClipStack(nn.Module):
    """Tables, layers and the last norm, for their names."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = _table(config.vocab_size, width)
        self.embeddings.position_embedding = _table(config.max_position_embeddings, width)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            ClipLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.final_layer_norm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-5))


def _table(count: int, width: int) -> nn.Embedding:
    """Return a table without values: random ones for no memory would import torch's compiler."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)
    return table


class ClipLayer(nn.Module):
    """Attention to what stands before, and two layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        eps = config.get("layer_norm_eps", 1e-5)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = ClipAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = ClipMlp(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Float[Tensor, "batch tokens width"], mask: Tensor | None) -> Tensor:
        """Return vectors of the same width."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class ClipAttention(nn.Module):
    """Attention of tokens to themselves and those before them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return what each token sees; `mask` is True where it may look, None for all before it."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.num_heads, width // self.num_heads)
        query, key, value = (
            layer(x).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None
        )
        out: Tensor = self.out_proj(seen.transpose(1, 2).reshape(x.shape))
        return out


class ClipMlp(nn.Module):
    """Two layers of each token by itself."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.is_quick = activation == "quick_gelu"
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors of the same width."""
        hidden = self.fc1(x)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.is_quick else gelu(hidden)
        out: Tensor = self.fc2(hidden)
        return out
