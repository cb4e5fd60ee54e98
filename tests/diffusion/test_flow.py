"""One step and many: identities, times per item, waiting items, what is refused.

The closed-form flow of Gaussian data is in test_gaussian_oracle.
"""

import inspect

import pytest
import torch

from twostep.diffusion import Prediction, prediction_from_output, solve, step, trailing_times
from twostep.diffusion.flow import FlowError


def falling(num_steps, batch):
    """The trailing grid with its landing, the same for every item."""
    return torch.tensor([*trailing_times(num_steps), 0])[:, None].repeat(1, batch)


def test_step_mixes_at_the_lower_time(schedule, randn):
    prediction = Prediction(x0=randn(3, 4), eps=randn(3, 4))
    x_s = step(prediction, torch.tensor([0, 250, 750]), schedule)
    assert torch.equal(x_s[0], prediction.x0[0])
    for item, s in ((1, 250), (2, 750)):
        expected = (
            schedule.alphas[s] * prediction.x0[item] + schedule.sigmas[s] * prediction.eps[item]
        )
        torch.testing.assert_close(x_s[item], expected)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v"])
def test_with_a_fixed_prediction_a_detour_changes_nothing(schedule, randn, prediction_type):
    t, s, r = (torch.full((2,), time) for time in (900, 600, 100))
    x_t = randn(2, 4)
    alpha, sigma = schedule.coefficients(t, x_t)
    fixed = prediction_from_output(randn(2, 4), x_t, alpha, sigma, prediction_type)

    x_s = step(fixed, s, schedule)
    alpha, sigma = schedule.coefficients(s, x_s)
    output = {"eps": fixed.eps, "x0": fixed.x0, "v": fixed.v(alpha, sigma)}[prediction_type]
    again = prediction_from_output(output, x_s, alpha, sigma, prediction_type)

    torch.testing.assert_close(step(again, r, schedule), step(fixed, r, schedule))


def test_a_step_is_eulers_in_the_coordinates_of_the_noise_level(schedule, randn):
    x_t, eps, (t, s) = randn(1, 6), randn(1, 6), (800, 300)
    alpha, sigma = schedule.coefficients(torch.tensor([t]), x_t)
    x_s = step(prediction_from_output(eps, x_t, alpha, sigma, "eps"), torch.tensor([s]), schedule)
    level = schedule.sigmas / schedule.alphas
    euler = x_t / schedule.alphas[t] + (level[s] - level[t]) * eps
    torch.testing.assert_close(x_s / schedule.alphas[s], euler, rtol=1e-13, atol=1e-13)


def test_a_point_of_data_is_reached_in_one_step(schedule, randn, gaussian):
    denoise = gaussian(0.7, 0.0, schedule)
    landed = solve(denoise, randn(4, 3), falling(1, 4), schedule)
    torch.testing.assert_close(landed, torch.full((4, 3), 0.7, dtype=torch.float64))


def test_each_item_walks_its_own_times(schedule, randn, gaussian):
    denoise, x = gaussian(0.7, 0.5, schedule), randn(3, 2)
    columns = ([1000, 500, 250], [750, 400, 0], [300, 200, 100])
    together = solve(denoise, x, torch.tensor(columns).T, schedule)
    for item, column in enumerate(columns):
        alone = solve(denoise, x[item : item + 1], torch.tensor(column)[:, None], schedule)
        torch.testing.assert_close(together[item : item + 1], alone)


def test_an_item_that_stands_still_is_left_as_it_is(schedule, randn, gaussian):
    denoise, x = gaussian(0.7, 0.5, schedule), randn(3, 2)
    moved = solve(denoise, x, torch.tensor([[1000, 500, 0], [500, 500, 0], [0, 0, 0]]), schedule)
    assert torch.equal(moved[1:2], solve(denoise, x[1:2], torch.tensor([[500], [0]]), schedule))
    assert torch.equal(moved[2], x[2]) and not torch.equal(moved[0], x[0])


def test_a_waiting_item_is_never_asked_about_time_zero(schedule, randn, gaussian):
    asked = []

    def denoise(x, t):
        asked.append(t.tolist())
        return gaussian(0.7, 0.5, schedule)(x, t)

    solve(denoise, randn(2, 2), torch.tensor([[1000, 500], [500, 0], [0, 0]]), schedule)
    assert asked == [[1000, 500], [500, 1]]


def test_a_waiting_item_keeps_its_gradient_clean(schedule, randn):
    x = randn(2, 2).requires_grad_()

    def denoise(x_t, t):
        alpha, sigma = schedule.coefficients(t, x_t)
        return prediction_from_output(0.1 * x_t, x_t, alpha, sigma, "x0")

    solve(denoise, x, torch.tensor([[1000, 0], [0, 0]]), schedule).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.1, 0.1], [1.0, 1.0]], dtype=torch.float64))


def test_one_network_call_per_interval_and_every_prediction_is_shown(schedule, randn, gaussian):
    calls, shown = [], []

    def denoise(x, t):
        calls.append(gaussian(0.7, 0.5, schedule)(x, t))
        return calls[-1]

    landed = solve(
        denoise,
        randn(2, 3),
        falling(4, 2),
        schedule,
        on_step=lambda i, prediction: shown.append((i, prediction)),
    )
    assert [i for i, _ in shown] == [0, 1, 2, 3]
    assert all(seen is made for (_, seen), made in zip(shown, calls, strict=True))
    torch.testing.assert_close(landed, shown[-1][1].x0, rtol=0, atol=0)


def test_stopping_on_the_way_and_going_on_is_the_same_walk(schedule, randn, gaussian):
    denoise, x, times = gaussian(0.7, 0.5, schedule), randn(2, 3), falling(8, 2)
    half = solve(denoise, x, times[:5], schedule)
    assert torch.equal(
        solve(denoise, half, times[4:], schedule), solve(denoise, x, times, schedule)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(schedule, randn, dtype, gaussian):
    x = randn(2, 3, dtype=torch.float32).to(dtype)
    assert solve(gaussian(0.7, 0.5, schedule), x, falling(2, 2), schedule).dtype == dtype


@pytest.mark.parametrize(
    ("times", "complaint"),
    [
        ([[1000, 1000]], r"at least 2 points and batch 2; got \[1, 2\]"),
        ([[1000], [0]], r"batch 2; got \[2, 1\]"),
        ([[500, 1000], [1000, 0]], r"must fall.*got \[500, 1000\]"),
    ],
)
def test_times_that_cannot_be_walked_are_refused(schedule, randn, times, complaint, gaussian):
    with pytest.raises(FlowError, match=complaint):
        inspect.unwrap(solve)(
            gaussian(0.7, 0.5, schedule), randn(2, 3), torch.tensor(times), schedule
        )
