"""The loop under every training: what it calls, logs, saves, and how it resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from twostep.training.loop import (
    LoopSettings,
    MovingAverage,
    Randomness,
    TrainingError,
    check_finite,
    learning_rate_factor,
    run_loop,
)
from twostep.training.run_folder import RunFolder


def settings(**changes: Any) -> LoopSettings:
    values = {
        "iterations": 10,
        "batch_size": 1,
        "learning_rate": 1.0,
        "checkpoint_every": 4,
        "log_every": 5,
    }
    return LoopSettings.model_validate(values | changes)


class Sum:
    """A state that adds up random numbers."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = list(state_dict["values"])

    def iterate(self, iteration: int, randomness: Randomness) -> dict[str, float]:
        self.values.append(torch.rand(1, generator=randomness.tensors).item())
        self.values.append(randomness.words.random())
        return {"loss": float(iteration)}


def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    whole, first, second = Sum(), Sum(), Sum()
    run_loop(whole.iterate, settings(), RunFolder(tmp_path / "a", settings()), "x", {"sum": whole})

    def interrupt(iteration: int, randomness: Randomness) -> dict[str, float]:
        if iteration == 6:
            raise KeyboardInterrupt
        return first.iterate(iteration, randomness)

    folder = RunFolder(tmp_path / "b", settings())
    with pytest.raises(KeyboardInterrupt):
        run_loop(interrupt, settings(), folder, "x", {"sum": first})
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert checkpoint["iteration"] == 4
    run_loop(second.iterate, settings(), folder, "x", {"sum": second})
    assert second.values == whole.values


def test_means_are_logged_and_callbacks_are_called(tmp_path: Path) -> None:
    state, seen, checkpoints = Sum(), [], []
    folder = RunFolder(tmp_path, settings())
    run_loop(
        state.iterate,
        settings(),
        folder,
        "x",
        {"sum": state},
        on_iteration=lambda num_done, figures: seen.append((num_done, figures["loss"])),
        on_checkpoint=checkpoints.append,
    )
    assert seen == [(i + 1, float(i)) for i in range(10)]
    assert checkpoints == [4, 8, 10]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["part"], line["iteration"], line["loss"]) for line in lines] == [
        ("x", 5, 2.0),
        ("x", 10, 7.0),
    ]


def test_a_refused_checkpoint_is_not_saved(tmp_path: Path) -> None:
    def refuse(num_done: int) -> None:
        if num_done == 8:
            raise TrainingError("no")

    state, folder = Sum(), RunFolder(tmp_path, settings())
    with pytest.raises(TrainingError):
        run_loop(
            state.iterate,
            settings(),
            folder,
            "x",
            {"sum": state},
            checkpoint_start=True,
            on_checkpoint=refuse,
        )
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert checkpoint["iteration"] == 4


def test_the_start_is_saved_where_it_is_asked_for(tmp_path: Path) -> None:
    def refuse(num_done: int) -> None:
        raise TrainingError("no")

    state, folder = Sum(), RunFolder(tmp_path, settings())
    with pytest.raises(TrainingError):
        run_loop(
            state.iterate,
            settings(),
            folder,
            "x",
            {"sum": state},
            checkpoint_start=True,
            on_checkpoint=refuse,
        )
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert checkpoint == {"iteration": 0, "sum": {"values": []}}


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    loop = settings(iterations=100, warmup_iterations=10, decay_share=0.2)
    assert learning_rate_factor(0, loop) == 0.1
    assert learning_rate_factor(10, loop) == learning_rate_factor(79, loop) == 1.0
    assert learning_rate_factor(90, loop) == pytest.approx(0.51)
    assert learning_rate_factor(100, loop) == pytest.approx(0.02)


def test_an_average_follows_and_gives_the_trained_weights_back() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = MovingAverage(network, decay=0.5)
    nn.init.ones_(network.weight)
    average.update()
    with average.applied():
        assert network.weight.item() == pytest.approx(1 - 1 / 11)
    assert network.weight.item() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops(value: float) -> None:
    assert check_finite(torch.tensor(1.0), "student", 3, settings()) == 1
    with pytest.raises(TrainingError, match=r"student loss is .* at iteration 3.* lower learning"):
        check_finite(torch.tensor(value), "student", 3, settings())
