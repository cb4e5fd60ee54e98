"""How sure a figure is: bootstrap intervals over prompts.

Prompts are drawn again and again with replacement, each with all of its pictures, and the figure is
taken of every such resample. Pictures of one prompt are alike, so drawing pictures one by one would
make the interval too narrow. All resamples are one matrix of counts, so a figure that is a mean
costs one product. Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from twostep.evaluate.histograms import total_variation

CONFIDENCE = 0.95
"""Share of the resamples that an interval covers."""

NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval; (None, None) if there is only one prompt to draw from."""

    value: float
    low: float | None
    high: float | None


class Resamples:
    """Resamples of the pictures of some prompts.

    Attributes:
        counts: how often each picture is in each resample.
        num_prompts: different prompts among the pictures.
    """

    counts: Float64[Tensor, "resamples items"]
    num_prompts: int

    def __init__(
        self, prompts: Sequence[Hashable], *, count: int = NUM_RESAMPLES, seed: int = 0
    ) -> None:
        """Draw the resamples.

        Args:
            prompts: of each picture; pictures with equal ones are drawn together.
            count: number of resamples.
            seed: the same seed and prompts give the same resamples.
        """
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        of_items = torch.tensor([numbers[prompt] for prompt in prompts])
        self.num_prompts = len(numbers)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(self.num_prompts, (count, self.num_prompts), generator=generator)
        of_prompts = torch.zeros(count, self.num_prompts, dtype=torch.float64)
        of_prompts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        self.counts = of_prompts[:, of_items]

    def mean(
        self, values: Float[Tensor, " items"], chosen: Bool[Tensor, " items"] | None = None
    ) -> Estimate:
        """Return the mean of a value, of all pictures or of those chosen (at least one)."""
        if chosen is None:
            chosen = torch.ones(len(values), dtype=torch.bool)
        value = float(values[chosen].double().mean())
        return self._percentiles(value, self._means(values[:, None], chosen)[:, 0])

    def ratio(self, above: Float[Tensor, " items"], below: Float[Tensor, " items"]) -> Estimate:
        """Return the mean of one value over the mean of another, of the same prompts."""
        value = float(above.double().mean() / below.double().mean())
        return self._percentiles(
            value, (self.counts @ above.double()) / (self.counts @ below.double())
        )

    def moved(self, value: float, influences: Float[Tensor, " items"]) -> Estimate:
        """Return a figure that each picture moves, to first order, by its influence.

        Plainly resampling a distance between distributions would bias it upwards, because copies of
        a picture look like a narrower distribution; its first-order part has no such bias.
        """
        everything = torch.ones(len(influences), dtype=torch.bool)
        return self._percentiles(value, value + self._means(influences[:, None], everything)[:, 0])

    def moved_by_both(
        self,
        value: float,
        ours: Float[Tensor, " items"],
        theirs: Float[Tensor, " others"],
        others: Resamples | None = None,
    ) -> Estimate:
        """Return a figure of two sets that each picture of both moves, to first order.

        Args:
            value: the figure.
            ours: influences of the pictures of these resamples.
            theirs: influences of the other set's pictures.
            others: resamples of the other set; None where it has the same prompts in the same
                order, whose pictures are then drawn together.
        """
        if others is None:
            return self.moved(value, ours + theirs)
        return _independent_sum(value, self.moved(0.0, ours), others.moved(0.0, theirs))

    def variation(
        self,
        classes: Int[Tensor, " items"],
        reference: Int[Tensor, " items"] | None,
        chosen: Bool[Tensor, " items"],
        num_classes: int,
    ) -> Estimate:
        """Return the total variation between the histograms of chosen pictures and a reference.

        Resampling makes a total variation larger, as sampling did, so the interval is that of the
        resamples moved until their median is the figure: it says how much the figure varies, not
        how much of it is due to few pictures.

        Args:
            classes: of each picture.
            reference: of other pictures of the same prompts in the same order; None for the uniform
                distribution.
            chosen: which pictures count; at least one.
            num_classes: how many classes there are.
        """
        ours = self._shares(classes, chosen, num_classes)
        if reference is None:
            theirs = torch.full_like(ours, 1 / num_classes)
        else:
            theirs = self._shares(reference, chosen, num_classes)
        variations = total_variation(ours, theirs)
        value = float(variations[0])
        excess = float(variations[1:].nanmedian()) - value
        return self._percentiles(value, (variations[1:] - excess).clamp(0, 1))

    def _shares(
        self, classes: Tensor, chosen: Tensor, num_classes: int
    ) -> Float64[Tensor, "rows classes"]:
        """Return histograms: that of the pictures themselves first, then that of each resample."""
        one_hot = torch.nn.functional.one_hot(classes, num_classes).double()
        whole = one_hot[chosen].mean(dim=0, keepdim=True)
        return torch.cat([whole, self._means(one_hot, chosen)])

    def _means(self, values: Tensor, chosen: Tensor) -> Float64[Tensor, "resamples columns"]:
        """Return the mean of columns of values in every resample; NaN where none was drawn."""
        counts = self.counts * chosen
        means: Tensor = counts @ values.double() / counts.sum(dim=1, keepdim=True)
        return means

    def _percentiles(self, value: float, resampled: Float64[Tensor, " resamples"]) -> Estimate:
        if self.num_prompts < 2:
            return Estimate(value, None, None)
        tail = (1 - CONFIDENCE) / 2
        tails = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        # A resample may hold none of the pictures that count.
        low, high = torch.nanquantile(resampled, tails).tolist()
        return Estimate(value, low, high)


def _independent_sum(value: float, first: Estimate, second: Estimate) -> Estimate:
    """Return a value whose two independent parts have intervals about 0: their squares add up."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Estimate(value, None, None)
    low = (first.low**2 + second.low**2) ** 0.5
    high = (first.high**2 + second.high**2) ** 0.5
    return Estimate(value, value - low, value + high)
