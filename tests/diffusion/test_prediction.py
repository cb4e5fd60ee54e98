"""Prediction types: each gives the other two, and guidance is linear in all of them."""

import inspect

import pytest
import torch

from twostep.diffusion.prediction import (
    Prediction,
    PredictionTypeError,
    eps_to_x0,
    guide,
    prediction_from_output,
    to_v,
    v_to_eps,
    v_to_x0,
    x0_to_eps,
)

TIMES = torch.tensor([1, 10, 250, 500, 1000])


@pytest.fixture
def point(schedule, randn):
    """(x0, eps, x_t, alpha, sigma) that truly belong together, with another time for every item."""
    x0, eps = randn(5, 3, 4, 4), randn(5, 3, 4, 4)
    alpha, sigma = schedule.coefficients(TIMES, x0)
    return x0, eps, alpha * x0 + sigma * eps, alpha, sigma


def test_eps_to_x0_to_v_to_eps(point):
    _, eps, x_t, alpha, sigma = point
    x0 = eps_to_x0(eps, x_t, alpha, sigma)
    v = to_v(x0, x0_to_eps(x0, x_t, alpha, sigma), alpha, sigma)
    torch.testing.assert_close(v_to_eps(v, x_t, alpha, sigma), eps)
    torch.testing.assert_close(v_to_x0(v, x_t, alpha, sigma), x0)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v", "flow"])
def test_every_type_finds_the_truth(point, prediction_type):
    x0, eps, x_t, alpha, sigma = point
    outputs = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    output = outputs[prediction_type]
    prediction = prediction_from_output(output, x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)
    torch.testing.assert_close(prediction.v(alpha, sigma), alpha * eps - sigma * x0)
    torch.testing.assert_close(prediction.flow(), eps - x0)


@pytest.mark.parametrize("prediction_type", ["eps", "x0", "v", "flow"])
def test_any_answer_explains_the_input(point, randn, prediction_type):
    *_, x_t, alpha, sigma = point
    prediction = prediction_from_output(randn(*x_t.shape), x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t)


def test_an_eps_error_at_the_top_is_multiplied_in_x0(schedule, randn):
    x_t, eps = randn(1, 8), randn(1, 8)
    alpha, sigma = schedule.coefficients(torch.tensor([1000]), x_t)
    right, wrong = (prediction_from_output(e, x_t, alpha, sigma, "eps") for e in (eps, eps + 1))
    torch.testing.assert_close(
        right.x0 - wrong.x0, torch.full((1, 8), 14.6146, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_an_unknown_type_is_named_with_the_known_ones(point):
    _, eps, x_t, alpha, sigma = point
    unchecked = inspect.unwrap(prediction_from_output)
    with pytest.raises(
        PredictionTypeError, match=r"'epsilon' is not known; expected eps, x0, v, flow or edm"
    ):
        unchecked(eps, x_t, alpha, sigma, "epsilon")


def test_guidance_pushes_away_from_the_unconditional(point, randn):
    *_, x_t, alpha, sigma = point
    with_text, without = (
        prediction_from_output(randn(*x_t.shape), x_t, alpha, sigma, "eps") for _ in range(2)
    )
    guided = guide(with_text, without, 4.0)
    torch.testing.assert_close(guided.eps, 4 * with_text.eps - 3 * without.eps)
    torch.testing.assert_close(guided.x0, eps_to_x0(guided.eps, x_t, alpha, sigma))


def test_scale_one_is_no_guidance_and_zero_no_text(point, randn):
    x_t = point[2]
    with_text = Prediction(randn(*x_t.shape), randn(*x_t.shape))
    without = Prediction(randn(*x_t.shape), randn(*x_t.shape))
    torch.testing.assert_close(guide(with_text, without, 1.0).eps, with_text.eps)
    assert torch.equal(guide(with_text, without, 0.0).x0, without.x0)


def test_shapes_are_checked_in_tests(randn):
    with pytest.raises(Exception, match=r"(?i)type-check"):
        Prediction(randn(2, 3), randn(2, 4))
