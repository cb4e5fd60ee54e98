"""Heads on frozen features: hinge and R1 by hand, and what the features are."""

import pytest
import torch
from torch import Tensor, nn

from twostep.distill.methods.heads import (
    Head,
    Heads,
    JudgeFeatures,
    TeacherFeatures,
    hinge_of_heads,
    hinge_of_student,
    r1_penalty,
    share_told_apart,
    told_time,
)
from twostep.evaluate.judge import Classes, Judge
from twostep.models.bundle import Bundle


def test_hinge_losses_are_those_of_the_definition() -> None:
    real = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0, 1.0]])]
    fake = [torch.tensor([[-2.0, 0.0]]), torch.tensor([[0.5, 0.5]])]
    # Heads: (0 + 0.5)/2 + (0 + 1)/2 and (2 + 0)/2 + (1.5 + 1.5)/2.
    assert hinge_of_heads(real, fake).item() == pytest.approx(0.25 + 0.5 + 1.0 + 1.5)
    assert hinge_of_student(fake).item() == pytest.approx(1.0 - 0.5)


def test_what_is_told_apart_is_judged_by_all_heads_together() -> None:
    real = [torch.tensor([[1.0], [-3.0]]), torch.tensor([[1.0], [1.0]])]
    fake = [torch.tensor([[-1.0], [-1.0]]), torch.tensor([[0.5], [3.0]])]
    assert share_told_apart(real, fake).item() == pytest.approx((0.5 + 0.5) / 2)


def test_r1_is_the_squared_gradient_at_the_heads_inputs() -> None:
    """A head that is linear, w . f at each of n places and then their sum: n |w|^2."""

    class Linear(Heads):
        def __init__(self) -> None:
            super().__init__((), hidden=8)
            self.weights = nn.ParameterList(
                [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([2.0]))]
            )

        def forward(self, features: list[Tensor], condition: Tensor | None) -> list[Tensor]:
            pairs = zip(features, self.weights, strict=True)
            return [torch.einsum("bchw,c->bhw", f, w).flatten(1) for f, w in pairs]

    heads = Linear()
    features = [torch.randn(5, 2, 2, 2), torch.randn(5, 1, 1, 1)]
    logits, penalty = r1_penalty(heads, features)
    assert penalty.item() == pytest.approx(4 * 25 + 4, rel=1e-4)
    torch.testing.assert_close(logits, heads(features, None))
    penalty.backward()
    # d/dw n |w|^2
    torch.testing.assert_close(heads.weights[0].grad, torch.tensor([24.0, 32.0]))


def test_a_condition_turns_the_logits_and_nothing_else_is_added(
    generator: torch.Generator,
) -> None:
    head = Head(6, hidden=8, condition_width=3)
    features = torch.randn(2, 6, 4, 4, generator=generator)
    condition = torch.randn(2, 3, generator=generator)
    plain, told = head(features), head(features, condition)
    assert plain.shape == told.shape == (2, 16)
    assert not torch.allclose(plain, told)
    with torch.no_grad():
        head.project.weight.zero_()
        head.project.bias.zero_()
    torch.testing.assert_close(head(features, condition), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(features.bfloat16(), condition).dtype == torch.float32


def test_the_teachers_features_are_its_levels_and_reach_the_latents(bundle: Bundle) -> None:
    frozen = TeacherFeatures(bundle.denoiser)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    conditioning = bundle.text.conditioning(["a red fox", ""], 64, 64)
    levels = frozen(x, torch.tensor([1, 500]), conditioning)
    assert tuple(level.shape[1] for level in levels) == frozen.widths
    heads = Heads(
        frozen.widths, hidden=8, condition_width=bundle.denoiser.backbone.spec.pooled_width
    )
    hinge_of_student(heads(levels, conditioning.pooled)).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in bundle.denoiser.network.parameters())


def test_the_judges_features_come_through_the_codec_at_its_size(bundle: Bundle) -> None:
    classes = Classes((), ("3d",), ("blue",))
    judge = Judge(classes, channels=(8, 16), pixels=32).eval().requires_grad_(False)
    frozen = JudgeFeatures(judge)
    latents = torch.randn(2, 4, 16, 16, requires_grad=True)
    levels = frozen(latents, bundle.codec)
    assert [tuple(level.shape) for level in levels] == [(2, 8, 16, 16), (2, 16, 8, 8)]
    levels[-1].sum().backward()
    assert latents.grad.abs().sum() > 0
    pictures = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(judge.levels(pictures)[-1], judge.body(pictures))


def test_heads_tell_times_apart() -> None:
    told = told_time(torch.tensor([1, 2, 500, 1000]), 1000, torch.device("cpu"))
    distances = torch.cdist(told, told) + torch.eye(4)
    assert distances.min() > 0.1
