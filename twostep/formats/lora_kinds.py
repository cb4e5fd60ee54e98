"""What an adapter's file does to one weight of a network.

Four kinds of change are added to a weight: a product of two matrices (LoRA, arXiv 2106.09685), a
Hadamard product of two such products (LoHa, arXiv 2108.06098), a Kronecker product (LoKr, arXiv
2309.14859), and a difference that is stored whole. A fifth gives the changed weight another length
in each row or column (DoRA, arXiv 2402.09353).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class WeightChange(Protocol):
    """A change of one weight, at a strength: 0 leaves the weight as it is, 1 is as trained."""

    @property
    def kind(self) -> str:
        """What such a change is called, as "LoRA"."""

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return a changed copy of a weight, in float32."""

    def to(self, weight: Tensor) -> WeightChange:
        """Return the change on the weight's device.

        A product of two matrices also takes the weight's precision, for it is computed beside it.
        """

    def fits(self, weight: Tensor) -> bool:
        """Tell whether the change has the shape that the weight needs."""


class Additive:
    """A change that is added to the weight."""

    @property
    def change(self) -> Tensor:
        """What is added, in float32."""
        raise NotImplementedError

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return weight + strength * change, in float32."""
        return weight.float() + (strength * self.change).reshape(weight.shape)

    def fits(self, weight: Tensor) -> bool:
        """Tell whether the change has as many rows and columns as the weight."""
        # Without memory: a LoKr's factors are small, and their product is not.
        shape = _meta(self).change.shape
        return shape.numel() == weight.numel() and shape[0] == len(weight)


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    """What a LoRA does to one layer: it adds alpha / rank * up down to the weight.

    `down` has the shape [rank, in, ...], `up` [out, rank, ...].
    """

    down: Tensor
    up: Tensor
    alpha: float

    kind = "LoRA"

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return len(self.down)

    @property
    def change(self) -> Tensor:
        """The matrix [out, in * kernel] that is added, in float32."""
        product: Tensor = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return self.alpha / self.rank * product

    def to(self, weight: Tensor) -> LowRank:
        """Return it on the weight's device and in its precision."""
        return replace(self, down=self.down.to(weight), up=self.up.to(weight))


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a LoHa or a LoKr: a matrix, a product a b, or a product around a core.

    Without a core `a` is [out, rank] and `b` [rank, in * kernel]. With the core of Tucker's form,
    [rank, rank, height, width], they are [rank, out] and [rank, in]. A factor that is stored whole
    has neither `b` nor core.
    """

    a: Tensor
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """The inner size of the product, None for a factor that is stored whole."""
        return None if self.b is None else len(self.b)

    @property
    def matrix(self) -> Tensor:
        """The factor [out, in] or [out, in, height, width], in float32."""
        a = self.a.float()
        if self.b is None:
            return a
        b = self.b.float()
        if self.core is None:
            return a.flatten(1) @ b.flatten(1)
        return torch.einsum("pqhw,po,qi->oihw", self.core.float(), a.flatten(1), b.flatten(1))

    def to(self, weight: Tensor) -> Factor:
        """Return it on the weight's device."""
        device = weight.device
        return Factor(
            self.a.to(device),
            None if self.b is None else self.b.to(device),
            None if self.core is None else self.core.to(device),
        )


@dataclass(frozen=True, eq=False)
class Hadamard(Additive):
    """What a LoHa does: it adds alpha / rank times the product, entry by entry, of two factors."""

    first: Factor
    second: Factor
    alpha: float

    kind = "LoHa"

    @property
    def change(self) -> Tensor:
        """What is added, in float32."""
        rank = self.first.rank
        assert rank is not None, "both factors of a LoHa are products"
        return self.alpha / rank * self.first.matrix * self.second.matrix

    def to(self, weight: Tensor) -> Hadamard:
        """Return it on the weight's device."""
        return replace(self, first=self.first.to(weight), second=self.second.to(weight))


@dataclass(frozen=True, eq=False)
class Kronecker(Additive):
    """What a LoKr does: it adds scale times the Kronecker product of two factors.

    The scale is alpha / rank, the rank being that of the second factor, or of the first where the
    second is stored whole. It is 1, whatever alpha says, if both are.
    """

    first: Factor
    second: Factor
    alpha: float | None

    kind = "LoKr"

    @property
    def change(self) -> Tensor:
        """What is added, in float32."""
        first = self.first.matrix
        second = self.second.matrix
        rank = self.second.rank or self.first.rank
        scale = 1.0 if rank is None or self.alpha is None else self.alpha / rank
        return scale * torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)

    def to(self, weight: Tensor) -> Kronecker:
        """Return it on the weight's device."""
        return replace(self, first=self.first.to(weight), second=self.second.to(weight))


@dataclass(frozen=True, eq=False)
class Difference(Additive):
    """A difference that is stored whole: of a weight, a bias, or the scale of a norm."""

    difference: Tensor

    kind = "full difference"

    @property
    def change(self) -> Tensor:
        """What is added, in float32."""
        return self.difference.float()

    def to(self, weight: Tensor) -> Difference:
        """Return it on the weight's device."""
        return Difference(self.difference.to(weight.device))


@dataclass(frozen=True, eq=False)
class Decomposed:
    """What a DoRA does: it changes the weight, then gives each row or column its own length.

    At strength 1 the weight becomes magnitude * V / |V| with V = weight + change (arXiv
    2402.09353, equation 5). Below, it lies on the way there: weight + strength * (that - weight),
    as ComfyUI has it; PEFT scales the change instead, and renormalises the rows even at 0.

    Args:
        inner: The change, of any additive kind.
        magnitude: The lengths, one for each row, or for each column (input channel).
        of_rows: Whether they are those of rows.
    """

    inner: LowRank | Hadamard | Kronecker
    magnitude: Tensor
    of_rows: bool = True

    @property
    def kind(self) -> str:
        """What such a change is called."""
        return "DoRA" if isinstance(self.inner, LowRank) else f"{self.inner.kind} with lengths"

    def applied(self, weight: Tensor, strength: float) -> Tensor:
        """Return the weight between itself and the decomposed one, in float32."""
        changed = self.inner.applied(weight, 1.0)
        kept = 0 if self.of_rows else 1
        axes = [axis for axis in range(changed.dim()) if axis != kept]
        shape = [1] * changed.dim()
        shape[kept] = -1
        lengths = changed.square().sum(dim=axes, keepdim=True).sqrt()
        full: Tensor = changed * self.magnitude.float().reshape(shape) / lengths
        return weight.float() + strength * (full - weight.float())

    def to(self, weight: Tensor) -> Decomposed:
        """Return it on the weight's device."""
        magnitude = self.magnitude.to(weight.device)
        inner = self.inner
        # In float32: half precision would be rounded before the length is taken.
        if isinstance(inner, LowRank):
            moved = replace(inner, down=inner.down.to(weight.device), up=inner.up.to(weight.device))
            return replace(self, inner=moved, magnitude=magnitude)
        return replace(self, inner=inner.to(weight), magnitude=magnitude)

    def fits(self, weight: Tensor) -> bool:
        """Tell whether the change has the weight's shape, and as many lengths as are needed."""
        count = weight.shape[0 if self.of_rows else 1]
        return self.inner.fits(weight) and self.magnitude.numel() == count


def without_core(down: Tensor, core: Tensor) -> Tensor:
    """Return the lower half of a LoRA in Tucker's form as that of an ordinary one, in float32.

    Args:
        down: [rank, in, 1, 1].
        core: [rank, rank, height, width], which stands between both halves.

    Returns [rank, in, height, width].
    """
    return torch.einsum("abhw,bi->aihw", core.float(), down.float().flatten(1)).contiguous()


def _meta(change: Additive) -> Additive:
    """Return a change of the same shapes without memory."""
    nowhere = torch.empty(0, device="meta")
    if isinstance(change, LowRank):
        return replace(change, down=change.down.to("meta"), up=change.up.to("meta"))
    moved = change.to(nowhere)  # type: ignore[attr-defined]
    assert isinstance(moved, Additive)
    return moved
