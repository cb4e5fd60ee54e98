"""Distribution matching on Gaussians, where scores, divergences and their gradients are known."""

import pytest
import torch

from twostep.distill.methods.matching import (
    distribution_matching_loss,
    draw_matching_times,
    fake_score_loss,
    matching_direction,
)
from twostep.distill.times import draw_uniform_times

from .conftest import SCHEDULE, gaussian, nothing

MEAN, DEVIATION = 0.7, 0.5
OWN_MEAN, OWN_DEVIATION = -0.2, 0.8


def at(t: int, count: int) -> torch.Tensor:
    return torch.full((count,), t)


def test_the_gradient_is_the_difference_of_the_scores(generator: torch.Generator) -> None:
    """g mean|x - x0_real| = sigma^2 / alpha (score_fake - score_real), by Tweedie's formula."""
    teacher, fake = gaussian(MEAN, DEVIATION), gaussian(OWN_MEAN, OWN_DEVIATION)
    x = torch.randn(8, 4, generator=generator).requires_grad_(True)
    eps = torch.randn(8, 4, generator=generator)
    t = torch.tensor([20, 100, 250, 400, 500, 700, 900, 980])
    loss = distribution_matching_loss(x, nothing(8), t, eps, teacher=teacher, fake=fake)
    (gradient,) = torch.autograd.grad(loss, x)
    x_t = SCHEDULE.add_noise(x.detach(), eps, t)
    alpha, sigma = SCHEDULE.coefficients(t, x_t)
    shift = torch.zeros(8, 1)
    scores = [one.network.score(x_t, t, shift) for one in (fake, teacher)]
    size = (x - teacher(x_t, t, nothing(8)).x0).abs().mean(dim=1, keepdim=True)
    expected = sigma**2 / alpha * (scores[0] - scores[1]) / size
    torch.testing.assert_close(gradient * x.numel(), expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("t", [100, 500, 900])
def test_its_mean_is_the_gradient_of_the_divergence(t: int, generator: torch.Generator) -> None:
    """d/dm KL(N(a m, v) || N(a m', v')) = a^2 (m - m') / v' with v' = a^2 d'^2 + s^2."""
    teacher, fake = gaussian(MEAN, DEVIATION), gaussian(OWN_MEAN, OWN_DEVIATION)
    count = 100_000
    x = OWN_MEAN + OWN_DEVIATION * torch.randn(count, 1, generator=generator)
    eps = torch.randn(count, 1, generator=generator)
    times, none = at(t, count), nothing(count)
    g = matching_direction(x, none, times, eps, teacher=teacher, fake=fake)
    real = teacher(SCHEDULE.add_noise(x, eps, times), times, none).x0
    alpha, sigma = SCHEDULE.alphas[t].item(), SCHEDULE.sigmas[t].item()
    # Without the normalisation, and the scores in the place of the x0.
    found = (g * (x - real).abs() * alpha / sigma**2).mean().item() * alpha
    expected = alpha**2 * (OWN_MEAN - MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)
    assert found == pytest.approx(expected, rel=0.02)


def test_the_pull_ends_where_both_distributions_are_one(generator: torch.Generator) -> None:
    x, eps = torch.randn(2, 16, 4, generator=generator)
    t = draw_matching_times(16, generator, SCHEDULE)
    same = gaussian(MEAN, DEVIATION)
    x.requires_grad_(True)
    loss = distribution_matching_loss(x, nothing(16), t, eps, teacher=same, fake=same)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_student_goes_to_the_teachers_mean_and_deviation(generator: torch.Generator) -> None:
    """Down the gradient, with a fake score that always is the student's own."""
    teacher = gaussian(MEAN, DEVIATION)
    mean = torch.tensor(OWN_MEAN, requires_grad=True)
    deviation = torch.tensor(OWN_DEVIATION, requires_grad=True)
    optimiser = torch.optim.Adam([mean, deviation], lr=0.03, betas=(0.5, 0.9))
    for _ in range(100):
        # Items of several values, so that what they are normalised by is no single number.
        noise, eps = torch.randn(2, 64, 16, generator=generator)
        t = draw_matching_times(64, generator, SCHEDULE)
        fake = gaussian(mean.item(), deviation.item())
        x = mean + deviation * noise
        loss = distribution_matching_loss(x, nothing(64), t, eps, teacher=teacher, fake=fake)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert mean.item() == pytest.approx(MEAN, abs=0.01)
    assert deviation.item() == pytest.approx(DEVIATION, abs=0.01)


def test_guidance_moves_the_real_score_alone(generator: torch.Generator) -> None:
    """A prompt that shifts the mean by 1, at scale 3: the difference to none is there thrice."""
    teacher = gaussian(MEAN, DEVIATION)
    x, eps = torch.randn(2, 8, 4, generator=generator)
    t, prompt = at(400, 8), nothing(8, shift=1.0)
    g = matching_direction(
        x, prompt, t, eps, teacher=teacher, fake=teacher, guidance=3.0, empty=nothing(8)
    )
    x_t = SCHEDULE.add_noise(x, eps, t)
    with_prompt, without = (teacher(x_t, t, each).x0 for each in (prompt, nothing(8)))
    real = without + 3 * (with_prompt - without)
    size = (x - real).abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(g * size, with_prompt - real, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="the empty prompt"):
        matching_direction(x, prompt, t, eps, teacher=teacher, fake=teacher, guidance=3.0)


def test_every_item_is_normalised_by_itself(generator: torch.Generator) -> None:
    teacher, fake = gaussian(MEAN, DEVIATION), gaussian(OWN_MEAN, OWN_DEVIATION)
    x, eps = torch.randn(2, 4, 4, generator=generator)
    t = at(300, 4)
    together = matching_direction(x, nothing(4), t, eps, teacher=teacher, fake=fake)
    for i in range(4):
        one = slice(i, i + 1)
        alone = matching_direction(x[one], nothing(1), t[one], eps[one], teacher=teacher, fake=fake)
        torch.testing.assert_close(together[one], alone)


def test_an_item_that_lies_where_the_teacher_sees_it_is_left_alone() -> None:
    """Data of one point: the teacher sees that point in everything, and nothing is 0 / 0."""
    x = torch.full((2, 4), MEAN)
    point = gaussian(MEAN, 0.0)
    eps = torch.zeros_like(x)
    g = matching_direction(
        x, nothing(2), at(500, 2), eps, teacher=point, fake=gaussian(OWN_MEAN, 0.5)
    )
    assert torch.equal(g, torch.zeros_like(x))


def test_the_fake_score_learns_the_students_distribution(generator: torch.Generator) -> None:
    """Its loss is least at the exact eps, where it is the spread of eps that x_t leaves open."""
    count = 100_000
    x = OWN_MEAN + OWN_DEVIATION * torch.randn(count, 1, generator=generator)
    eps = torch.randn(count, 1, generator=generator)
    t = at(400, count)

    def loss(mean: float, deviation: float) -> float:
        fake = gaussian(mean, deviation)
        return fake_score_loss(x, nothing(count), t, eps, fake=fake, schedule=SCHEDULE).item()

    alpha, sigma = SCHEDULE.alphas[400].item(), SCHEDULE.sigmas[400].item()
    spread = (alpha * OWN_DEVIATION) ** 2
    assert loss(OWN_MEAN, OWN_DEVIATION) == pytest.approx(spread / (spread + sigma**2), rel=0.02)
    for mean, deviation in ((OWN_MEAN + 0.2, OWN_DEVIATION), (OWN_MEAN, OWN_DEVIATION + 0.2)):
        assert loss(mean, deviation) > loss(OWN_MEAN, OWN_DEVIATION)


def test_no_gradient_of_the_fake_score_reaches_the_student(generator: torch.Generator) -> None:
    x = torch.randn(4, 2, generator=generator, requires_grad=True)
    fake = gaussian(OWN_MEAN, OWN_DEVIATION)
    fake.network.requires_grad_(True)
    eps = torch.randn(4, 2, generator=generator)
    loss = fake_score_loss(x, nothing(4), at(300, 4), eps, fake=fake, schedule=SCHEDULE)
    loss.backward()
    assert x.grad is None
    assert fake.network.mean.grad != 0


def test_times_are_uniform_between_their_shares(generator: torch.Generator) -> None:
    drawn = draw_matching_times(20_000, generator, SCHEDULE)
    assert (drawn.min().item(), drawn.max().item()) == (20, 980)
    assert drawn.float().mean().item() == pytest.approx(500, abs=8)
    everywhere = draw_uniform_times(20_000, generator, SCHEDULE)
    assert (everywhere.min().item(), everywhere.max().item()) == (1, 1000)
