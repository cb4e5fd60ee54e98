"""The loop under every training: what it calls, logs, saves, and how it resumes."""

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

from twostep.training import device, loop
from twostep.training.device import computes_bfloat16
from twostep.training.loop import (
    LoopSettings,
    Means,
    MovingAverage,
    Pace,
    Randomness,
    TrainingError,
    check_number,
    learning_rate_factor,
    run_loop,
)
from twostep.training.run_folder import RunFolder
from twostep.training.stopping import StoppedError


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


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_computed_where_the_device_does_it(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "computes_bfloat16", lambda device_type: native)
    layer = nn.Linear(2, 2)
    said = nullcontext() if native else pytest.warns(UserWarning, match="computing in float32")
    with said, settings(precision="bf16").autocast("cpu"):
        assert layer(torch.ones(1, 2)).dtype == expected


def test_every_accelerator_counts_as_computing_bfloat16() -> None:
    assert computes_bfloat16("cuda")


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


def test_a_mean_takes_in_what_came_before_a_checkpoint(tmp_path: Path) -> None:
    """The run stops between two lines of the log; the next line is still of all five iterations."""
    state = Sum()

    def stop(num_done: int, figures: dict[str, float]) -> None:
        if num_done == 6 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt

    folder = RunFolder(tmp_path, settings())
    with pytest.raises(KeyboardInterrupt):
        run_loop(state.iterate, settings(), folder, "x", {"sum": state}, on_iteration=stop)
    run_loop(state.iterate, settings(), folder, "x", {"sum": state}, on_iteration=stop)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Of iterations 0 to 4, once more after the checkpoint at 4, and of 5 to 9.
    assert [(line["iteration"], line["loss"]) for line in lines] == [(5, 2), (5, 2), (10, 7)]


def test_a_figure_of_some_iterations_is_averaged_over_those(tmp_path: Path) -> None:
    """As of a role that steps in every fourth one, and not in the one before a line is written."""

    def iterate(iteration: int, randomness: Randomness) -> dict[str, float]:
        figures = {"always": 1.0}
        return {**figures, "student_loss": float(iteration)} if iteration % 4 == 0 else figures

    folder = RunFolder(tmp_path, settings())
    run_loop(iterate, settings(), folder, "x", {"sum": Sum()})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # 0 and 4 of the first five, 8 of the next.
    assert [(line["always"], line["student_loss"]) for line in lines] == [(1.0, 2.0), (1.0, 8.0)]


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
    assert checkpoint == {
        "iteration": 0,
        "sum": {"values": []},
        "examined": True,
        "means": {"sums": {}, "counts": {}},
    }


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    loop = settings(iterations=100, warmup_iterations=10, decay_share=0.2)
    assert learning_rate_factor(0, loop) == 0.1
    assert learning_rate_factor(10, loop) == learning_rate_factor(79, loop) == 1.0
    assert learning_rate_factor(90, loop) == pytest.approx(0.51)
    assert learning_rate_factor(100, loop) == pytest.approx(0.02)


def test_past_the_last_iteration_the_learning_rate_stays() -> None:
    assert learning_rate_factor(6, settings(iterations=4, warmup_iterations=1)) == 1.0
    decayed = settings(iterations=4, warmup_iterations=1, decay_share=0.5, final_rate=0.1)
    assert learning_rate_factor(6, decayed) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {0: 0.1, 9: 1.0, 10: 1.0, 109: 1.0}),
        ({"schedule": "constant"}, {0: 0.1, 10: 1.0, 109: 1.0}),
        # Over the hundred iterations after the warm-up: half, and a quarter of the way, down to 0.
        ({"schedule": "linear"}, {4: 0.5, 10: 1.0, 35: 0.75, 60: 0.5, 109: 0.01}),
        ({"schedule": "cosine"}, {10: 1.0, 43: 0.5 + math.cos(0.33 * math.pi) / 2, 60: 0.5}),
        # Four arcs of 25: each begins at the peak, and is half down in its middle.
        (
            {"schedule": "cosine", "restarts": 3},
            {10: 1.0, 15: 0.5 + math.cos(0.2 * math.pi) / 2, 35: 1.0, 60: 1.0, 85: 1.0, 90: 0.9045},
        ),
        ({"schedule": "linear", "restarts": 1}, {10: 1.0, 35: 0.5, 59: 0.02, 60: 1.0, 85: 0.5}),
        # Over the last half of 110 alone.
        ({"schedule": "linear", "decay_share": 0.5}, {54: 1.0, 55: 1.0, 66: 0.8, 99: 0.2}),
        ({"decay_share": 0.5, "restarts": 1}, {55: 1.0, 60: 0.9206, 82: 0.0008, 83: 0.9992}),
        ({"schedule": "linear", "final_rate": 0.2}, {10: 1.0, 60: 0.6, 110: 0.2}),
        # A warm-up that never ends leaves nothing to decay.
        ({"schedule": "cosine", "warmup_iterations": 110}, {54: 0.5, 109: 1.0}),
    ],
)
def test_schedules_have_the_values_of_their_formulas(
    changes: dict[str, Any], expected: dict[int, float]
) -> None:
    loop = settings(**{"iterations": 110, "warmup_iterations": 10, "final_rate": 0.0} | changes)
    found = {iteration: learning_rate_factor(iteration, loop) for iteration in expected}
    assert found == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        (
            {"schedule": "linear"},
            lambda optimiser: LinearLR(optimiser, 1.0, end_factor=0.1, total_iters=42),
        ),
        ({"schedule": "cosine"}, lambda optimiser: CosineAnnealingLR(optimiser, 42, eta_min=0.1)),
        (
            {"schedule": "cosine", "restarts": 2},
            lambda optimiser: CosineAnnealingWarmRestarts(optimiser, 14, eta_min=0.1),
        ),
    ],
    ids=["linear", "cosine", "restarts"],
)
def test_schedules_are_those_of_torch(
    changes: dict[str, Any], make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    loop = settings(iterations=50, warmup_iterations=8, final_rate=0.1, **changes)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = make(optimiser)
    for iteration in range(8, 50):
        expected = optimiser.param_groups[0]["lr"]
        assert learning_rate_factor(iteration, loop) == pytest.approx(expected), iteration
        optimiser.step()
        theirs.step()


def test_a_decay_without_a_schedule_has_the_values_that_it_had() -> None:
    # Where no schedule is given a decay begins within the warm-up, as ever.
    loop = settings(iterations=300, warmup_iterations=20, decay_share=1.0)
    for iteration in range(20, 300):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, 1 - (300 - iteration) / 300.0)))
        assert learning_rate_factor(iteration, loop) == 0.02 + (1 - 0.02) * cosine


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "constant", "decay_share": 0.5}, "contradict each other"),
        ({"restarts": 2}, 'give schedule = "cosine" too'),
        ({"restarts": 2, "schedule": "constant"}, 'give schedule = "cosine" too'),
        ({"schedule": "cosine_with_restarts"}, "'constant', 'cosine' or 'linear'"),
    ],
)
def test_schedules_that_mean_nothing_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings(**changes)


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
    check_number(1.0, "student", 3, settings())
    with pytest.raises(TrainingError, match=r"student loss is .* at iteration 3.* lower learning"):
        check_number(value, "student", 3, settings())


def stopping_at(state: Sum, iteration: int, number: signal.Signals) -> Callable[..., Any]:
    """Iterations of a state, in one of which this process is sent a signal."""

    def iterate(now: int, randomness: Randomness) -> dict[str, float]:
        if now == iteration:
            signal.raise_signal(number)
        return state.iterate(now, randomness)

    return iterate


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_a_signal_stops_after_the_iteration_with_a_checkpoint(
    number: signal.Signals, exit_code: int, tmp_path: Path
) -> None:
    whole, first, second = Sum(), Sum(), Sum()
    run_loop(whole.iterate, settings(), RunFolder(tmp_path / "a", settings()), "x", {"sum": whole})
    folder = RunFolder(tmp_path / "b", settings())
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="x stopped after iteration 7 of 10") as stopped:
        run_loop(stopping_at(first, 6, number), settings(), folder, "x", {"sum": first})
    assert stopped.value.exit_code == exit_code
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert checkpoint["iteration"] == 7
    run_loop(second.iterate, settings(), folder, "x", {"sum": second})
    assert second.values == whole.values


def test_whoever_asks_to_stop_does_not_wait_for_pictures(tmp_path: Path) -> None:
    """Iteration 8 is due for a checkpoint with all that belongs to it, which it gets when the run
    goes on; the last one always gets it.
    """
    state, folder, examined = Sum(), RunFolder(tmp_path, settings()), []
    for iteration, by_then in ((7, [4]), (9, [4, 8, 10])):
        with pytest.raises(StoppedError):
            run_loop(
                stopping_at(state, iteration, signal.SIGTERM),
                settings(),
                folder,
                "x",
                {"sum": state},
                on_checkpoint=examined.append,
            )
        checkpoint = folder.load("x")
        assert checkpoint is not None
        assert checkpoint["iteration"] == iteration + 1
        assert examined == by_then


@pytest.mark.parametrize("iteration", [1, 3, 4, 6])
def test_figures_that_the_caller_takes_are_kept_over_a_stop(iteration: int, tmp_path: Path) -> None:
    """Checkpoints are due after 4, 8 and 10 iterations, and each iteration's figure is its number,
    so their means are known; stopped where one is due, or between.
    """
    found: list[tuple[int, float]] = []

    def run(iterate: Callable[..., Any], state: Sum) -> None:
        means = Means()
        run_loop(
            iterate,
            settings(),
            RunFolder(tmp_path, settings()),
            "x",
            {"sum": state},
            means={"taken": means},
            on_iteration=lambda num_done, figures: means.add(figures),
            on_checkpoint=lambda num_done: found.append((num_done, means.taken()["loss"])),
        )

    with pytest.raises(StoppedError):
        first = Sum()
        run(stopping_at(first, iteration, signal.SIGTERM), first)
    again = Sum()
    run(again.iterate, again)
    assert found == [(4, 1.5), (8, 5.5), (10, 8.5)]


def test_a_checkpoint_of_an_older_version_lacks_figures(tmp_path: Path) -> None:
    folder, state, means = RunFolder(tmp_path, settings()), Sum(), Means()
    folder.save("x", {"iteration": 9, "sum": state.state_dict()})
    run_loop(state.iterate, settings(), folder, "x", {"sum": state}, means={"taken": means})
    assert len(state.values) == 2


def test_the_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    state = Sum()

    def iterate(now: int, randomness: Randomness) -> dict[str, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return state.iterate(now, randomness)

    with pytest.raises(KeyboardInterrupt):
        run_loop(iterate, settings(), RunFolder(tmp_path, settings()), "x", {"sum": state})
    assert state.values == []


def test_a_signal_in_the_last_iteration_loses_nothing(tmp_path: Path) -> None:
    state, folder = Sum(), RunFolder(tmp_path, settings())
    with pytest.raises(StoppedError):
        iterate = stopping_at(state, 9, signal.SIGTERM)
        run_loop(iterate, settings(), folder, "x", {"sum": state})
    again = Sum()
    run_loop(again.iterate, settings(), folder, "x", {"sum": again})
    assert again.values == state.values


def test_it_stops_before_the_deadline(tmp_path: Path) -> None:
    """Iterations of 0.1 s: before 0.5 s are over, and as late as 1.5 iterations allow."""
    state, folder = Sum(), RunFolder(tmp_path, settings())

    def iterate(now: int, randomness: Randomness) -> dict[str, float]:
        time.sleep(0.1)
        return state.iterate(now, randomness)

    folder.deadline = time.monotonic() + 0.5
    with pytest.raises(StoppedError) as stopped:
        run_loop(iterate, settings(checkpoint_every=100), folder, "x", {"sum": state})
    assert time.monotonic() < folder.deadline
    assert stopped.value.exit_code == 75
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert 2 <= checkpoint["iteration"] <= 4
    folder.deadline = None


def test_a_rollback_passes_over_what_was_written_because_it_was_asked_to_stop(
    tmp_path: Path,
) -> None:
    state, folder = Sum(), RunFolder(tmp_path, settings())
    with pytest.raises(StoppedError):
        iterate = stopping_at(state, 6, signal.SIGTERM)
        run_loop(iterate, settings(), folder, "x", {"sum": state})
    starts: list[int] = []

    def first_of(now: int, randomness: Randomness) -> dict[str, float]:
        starts.append(now)
        raise TrainingError("enough")

    for only_examined in (False, True):
        with pytest.raises(TrainingError):
            run_loop(
                first_of,
                settings(),
                folder,
                "x",
                {"sum": Sum()},
                only_examined=only_examined,
            )
    assert starts == [7, 4]


def test_old_checkpoints_go(tmp_path: Path) -> None:
    state = Sum()
    loop = settings(iterations=20, checkpoint_every=3, keep_checkpoints=3)
    folder = RunFolder(tmp_path, loop)
    run_loop(state.iterate, loop, folder, "x", {"sum": state})
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["x.000015.pt", "x.000018.pt", "x.pt"]


def test_what_is_done_every_so_often_is_done_once(tmp_path: Path) -> None:
    """Also what a stop came before, and before the first iteration where that is asked for."""
    done: list[int] = []
    every = loop.Periodic("x", 3, done.append, lambda num_done: num_done in done, at_start=True)
    never = loop.Periodic("y", None, pytest.fail, lambda num_done: False)
    state = Sum()

    def run(iterate: Callable[..., Any]) -> None:
        folder = RunFolder(tmp_path, settings())
        run_loop(iterate, settings(), folder, "x", {"sum": state}, periodic=[every, never])

    with pytest.raises(StoppedError, match="after iteration 6"):
        run(stopping_at(state, 5, signal.SIGTERM))
    assert done == [0, 3]
    run(state.iterate)
    assert done == [0, 3, 6, 9]


def test_without_being_asked_nothing_is_done_at_the_start(tmp_path: Path) -> None:
    done: list[int] = []
    every = loop.Periodic("x", 5, done.append, lambda num_done: False)
    folder = RunFolder(tmp_path, settings())
    state = Sum()
    run_loop(state.iterate, settings(), folder, "x", {"sum": state}, periodic=[every])
    assert done == [5, 10]


class StacksCounted(TorchDispatchMode):
    """Counts how often several scalars become one tensor, and refuses to read any by itself."""

    num_stacks = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a figure was waited for"
        self.num_stacks += func is torch.ops.aten.stack.default
        return func(*args, **(kwargs or {}))


def logged_losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["loss"]) for line in lines if "loss" in line]


def test_figures_on_a_device_are_read_together_and_are_the_same(tmp_path: Path) -> None:
    chosen = settings(iterations=20, log_every=5, checkpoint_every=10)
    losses = torch.rand(20)

    def run(name: str, **options: int) -> list[tuple[int, float]]:
        folder = RunFolder(tmp_path / name, chosen)
        run_loop(lambda i, _: {"loss": losses[i], "rate": 0.5}, chosen, folder, "x", {}, **options)
        return logged_losses(tmp_path / name)

    with StacksCounted() as counted:
        together = run("together", read_every=100)
    assert counted.num_stacks == 4
    assert together == run("one by one")
    means = losses.double().view(4, 5).mean(dim=1).tolist()
    assert together == [(5 * i + 5, pytest.approx(mean, rel=1e-12)) for i, mean in enumerate(means)]


def test_a_figure_that_is_read_late_is_checked_before_it_is_kept(tmp_path: Path) -> None:
    chosen = settings(iterations=20, log_every=20, checkpoint_every=4)
    folder = RunFolder(tmp_path, chosen)
    losses = torch.ones(20)
    losses[5] = torch.nan
    with pytest.raises(TrainingError, match="x loss is nan at iteration 5"):
        run_loop(
            lambda i, _: {"loss": losses[i]},
            chosen,
            folder,
            "x",
            {"sum": Sum()},
            read_every=20,
            check=lambda i, figures: check_number(figures["loss"], "x", i, chosen),
        )
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert checkpoint["iteration"] == 4


class Clock:
    """A time that only passes where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: self.seconds))

    def iterate(self, seconds: float) -> Callable[[int, Randomness], dict[str, float]]:
        def iterate(iteration: int, randomness: Randomness) -> dict[str, float]:
            self.seconds += seconds
            return {"loss": 1.0}

        return iterate


def test_there_are_checkpoints_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = Clock(monkeypatch), []
    chosen = settings(checkpoint_every=8, checkpoint_seconds=25)
    folder = RunFolder(tmp_path, chosen)
    run_loop(clock.iterate(10.0), chosen, folder, "x", {}, on_checkpoint=seen.append)
    assert seen == [3, 6, 8, 10]


def test_as_many_iterations_are_done_as_fit_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, seen = Clock(monkeypatch), []
    chosen = settings(
        iterations=1000,
        limit_seconds=100,
        decay_share=0.5,
        warmup_iterations=2,
        checkpoint_every=1000,
    )
    folder = RunFolder(tmp_path, chosen)
    pace = Pace(chosen)
    rates = []

    def iterate(iteration: int, randomness: Randomness) -> dict[str, float]:
        rates.append(learning_rate_factor(iteration, chosen, pace.iterations))
        # What is compiled at first makes the first one slow.
        return clock.iterate(20.0 if iteration == 0 else 0.5)(iteration, randomness)

    run_loop(iterate, chosen, folder, "x", {}, pace=pace, on_checkpoint=seen.append)
    # (95 - 19.5) / 0.5 iterations of which the first took 19.5 s longer.
    assert seen == [151]
    assert clock.seconds == pytest.approx(95, abs=0.5)
    assert rates[70] == 1.0
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    checkpoint = folder.load("x")
    assert checkpoint is not None
    assert checkpoint["pace"] == {"iterations": 151, "spent": pytest.approx(94.5, abs=0.01)}


def test_the_pace_goes_on_where_a_call_ended() -> None:
    chosen = settings(iterations=1000, limit_seconds=100, decay_share=0.5, warmup_iterations=0)
    before = Pace(chosen)
    before.begin()
    before.look(10, 5.0)
    before.look(20, 10.0)
    assert before.iterations == 190
    after = Pace(chosen)
    after.load_state_dict(before.state_dict())
    after.begin()
    assert after.iterations == 190
    # Twice as fast from here: 85 seconds are left for a quarter of a second each.
    after.look(30, 2.5)
    after.look(40, 5.0)
    assert after.iterations == 40 + int(80 / 0.25)
    # The rate falls already: the number stands, however slow it becomes.
    after.look(190, 500.0)
    assert after.iterations == 360


def test_without_a_limit_the_pace_is_that_of_the_settings() -> None:
    pace = Pace(settings())
    pace.begin()
    pace.look(1, 1e6)
    pace.look(2, 2e6)
    assert pace.iterations == 10


def test_randomness_on_a_device_is_its_own_and_comes_again() -> None:
    def drawn(seed: int, iteration: int) -> torch.Tensor:
        generator = Randomness.at(seed, iteration, "x").on(torch.device("cpu"))
        return torch.rand(4, generator=generator)

    assert torch.equal(drawn(0, 3), drawn(0, 3))
    others = [drawn(0, 4), drawn(1, 3), torch.rand(4, generator=Randomness.at(0, 3, "x").tensors)]
    assert all((drawn(0, 3) != other).all() for other in others)
