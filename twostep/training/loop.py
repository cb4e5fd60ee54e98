"""The loop under every training: iterate, log, save checkpoints, resume.

What one iteration does is its caller's matter. Every iteration gets randomness of its own that is
seeded from the seed, the name of what is trained and the number of the iteration, so a resumed run
draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from twostep.errors import TwostepError
from twostep.training import device as devices
from twostep.training.figures import Figures, UnreadFigures
from twostep.training.processes import averaged, largest
from twostep.training.recipe import ANY_TIME, WHILE_RUNNING, Settings
from twostep.training.run_folder import RunFolder
from twostep.training.run_log import SECONDS
from twostep.training.stopping import OUT_OF_TIME, StoppedError, StopRequest, stop_requests

OnIteration = Callable[[int, dict[str, float]], None]
"""Called after every iteration with the number of iterations done and the figures of the last."""

_MEANS = "means"
"""Where a checkpoint keeps the figures that are not yet logged."""

_PACE = "pace"
"""Where a checkpoint keeps how many iterations there will be."""

_EXAMINED = "examined"
"""Where a checkpoint says whether `on_checkpoint` has let it pass."""

Schedule = Literal["constant", "cosine", "linear"]
"""How a learning rate moves after its warm-up."""

_SHARE_OF_LIMIT = 0.95
"""Of `limit_seconds`, what iterations are planned for; the rest is for what cannot be foreseen."""


class TrainingError(TwostepError):
    """Training cannot go on, for instance because a loss is not a finite number."""


class LoopSettings(Settings):
    """Number and size of iterations, learning rate, precision, seed, and how often to keep what."""

    iterations: int = Field(
        gt=0, description="number of iterations", json_schema_extra=WHILE_RUNNING
    )
    batch_size: int = Field(
        gt=0, description="examples per iteration", json_schema_extra=WHILE_RUNNING
    )
    learning_rate: float = Field(
        gt=0, description="peak learning rate of every optimiser", json_schema_extra=WHILE_RUNNING
    )
    warmup_iterations: int = Field(
        100, ge=0, description="iterations of linear warm-up", json_schema_extra=WHILE_RUNNING
    )
    decay_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the iterations over which the rate decays, the last ones; where it "
        "is 0 and a schedule is given, all after the warm-up",
        json_schema_extra=WHILE_RUNNING,
    )
    schedule: Schedule | None = Field(
        None,
        description="constant, or along what the rate decays: cosine or linear; if not given, a "
        "cosine where there is a decay_share",
        json_schema_extra=WHILE_RUNNING,
    )
    restarts: int = Field(
        0,
        ge=0,
        description="how often a decaying rate rises to its peak again and decays anew",
        json_schema_extra=WHILE_RUNNING,
    )
    final_rate: float = Field(
        0.02,
        ge=0,
        le=1,
        description="where the decay ends, as a share of the peak learning rate",
        json_schema_extra=WHILE_RUNNING,
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="decay per step of the averaged weights that are kept",
        json_schema_extra=WHILE_RUNNING,
    )
    precision: str = Field(
        "bf16",
        pattern="^(fp32|bf16)$",
        description="autocast precision of forward passes; fp32 on a CPU without bfloat16",
        json_schema_extra=WHILE_RUNNING,
    )
    limit_seconds: float | None = Field(
        None,
        gt=0,
        description="what the training may take: where its iterations would take longer, fewer are "
        "done, and the decay of the rate comes sooner",
        json_schema_extra=WHILE_RUNNING,
    )
    checkpoint_every: int = Field(
        500, gt=0, description="iterations between checkpoints", json_schema_extra=ANY_TIME
    )
    checkpoint_seconds: float | None = Field(
        None,
        gt=0,
        description="seconds after which there is a checkpoint beside those, with its pictures",
        json_schema_extra=ANY_TIME,
    )
    keep_checkpoints: int = Field(
        2,
        gt=0,
        description="how many checkpoints of a stage are kept until it is finished",
        json_schema_extra=ANY_TIME,
    )
    log_every: int = Field(
        50, gt=0, description="iterations between lines of the log", json_schema_extra=ANY_TIME
    )
    seed: int = Field(0, ge=0, lt=2**20, description="seed of everything random")

    @model_validator(mode="after")
    def _one_schedule(self) -> LoopSettings:
        if self.schedule == "constant" and self.decay_share > 0:
            raise ValueError(
                f'schedule = "constant" and decay_share = {self.decay_share:g} contradict each '
                "other: leave one of them out, or set decay_share to 0"
            )
        if self.restarts and self.schedule in (None, "constant") and self.decay_share == 0:
            raise ValueError('restarts are of a rate that decays: give schedule = "cosine" too')
        return self

    def read_every(self, device: str) -> int:
        """Return after how many iterations on a type of device figures become numbers.

        A CPU has computed what it returns. Others would have to be waited for.
        """
        return 1 if device == "cpu" else self.log_every

    @contextmanager
    def autocast(self, device: str = "cpu") -> Iterator[None]:
        """Run forward passes of the block in the precision of these settings on a device type.

        On a CPU that would have to emulate bfloat16 they run in float32, and a warning says so.
        """
        in_bfloat16 = self.precision == "bf16"
        if in_bfloat16 and not devices.computes_bfloat16(device):
            warnings.warn(
                "this CPU has no bfloat16 instructions: computing in float32, which is many times "
                "faster here",
                stacklevel=3,
            )
            in_bfloat16 = False
        with (
            torch.autocast(device, torch.bfloat16, enabled=in_bfloat16),
            training_attention(device),
        ):
            yield


def training_attention(device: str) -> AbstractContextManager[None]:
    """Choose the attention kernel for training on a device type, as a context manager.

    On the CPU the backward pass of the plain kernel is a quarter faster than that of the fused one;
    on other devices torch chooses. Backward passes need this context as well: a block under
    gradient checkpointing is computed again there, and must be computed by the same kernel.
    """
    if device != "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context


@dataclass(frozen=True)
class Randomness:
    """The random numbers of one iteration: a generator for tensors and one for words."""

    tensors: torch.Generator
    words: random.Random

    @classmethod
    def at(cls, seed: int, iteration: int, part: str = "") -> Randomness:
        """Return the randomness of one iteration, which depends on these three alone.

        Args:
            seed: of the training.
            iteration: counts from 0.
            part: the name of what is trained, so that the parts of a run, which share a seed, do
                not see the same examples with the same noise.
        """
        number = hashed_seed(seed, part, iteration)
        return cls(torch.Generator().manual_seed(number), random.Random(number))

    def on(self, device: torch.device) -> torch.Generator:
        """Return a generator on a device, seeded as this iteration is.

        For noise that would take longer to draw on the CPU than to train on. Every type of device
        draws other numbers, but the same ones after every resume.
        """
        seed = hashed_seed(self.tensors.initial_seed(), "device")
        return torch.Generator(device).manual_seed(seed)

    def normal(self, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Return normal noise: drawn on a device by `on`, or on the CPU, the same everywhere."""
        generator = self.tensors if device is None else self.on(device)
        return torch.randn(tuple(shape), generator=generator, device=device)

    def copy(self) -> Randomness:
        """Return randomness that will draw the same."""
        tensors = torch.Generator()
        tensors.set_state(self.tensors.get_state())
        words = random.Random()
        words.setstate(self.words.getstate())
        return Randomness(tensors, words)


def hashed_seed(*parts: object) -> int:
    """Return a seed that depends on all of some values, in 31 bits, as torch's generator wants."""
    return random.Random("/".join(str(part) for part in parts if part != "")).getrandbits(31)


class MovingAverage:
    """An exponential moving average of weights in training, of a network or of a LoRA.

    The decay grows from about a tenth to `decay` over the first updates, so that the average soon
    forgets the weights from which training started.
    """

    def __init__(self, trained: Stateful, decay: float) -> None:
        """Start from the present weights.

        Args:
            trained: whose `state_dict` is averaged.
            decay: share of the old average that an update keeps, in [0, 1).
        """
        self.trained = trained
        self.decay = decay
        self.num_updates = 0
        self.weights = {key: value.detach().clone() for key, value in trained.state_dict().items()}
        self._found: dict[str, Tensor] | None = None

    def update(self) -> None:
        """Take the present weights into the average."""
        self.num_updates += 1
        decay = min(self.decay, self.num_updates / (self.num_updates + 10))
        current = self._current()
        floats = [key for key, value in self.weights.items() if value.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.weights[key] for key in floats],
                [current[key] for key in floats],
                1 - decay,
            )

    def _current(self) -> dict[str, Tensor]:
        """Return the present weights; those of a whole network are looked for once.

        A walk through all modules takes as long as a tenth of an iteration on a fast GPU.
        """
        if self._found is not None:
            return self._found
        if not isinstance(self.trained, nn.Module):
            return self.trained.state_dict()
        found: dict[str, Tensor] = self.trained.state_dict(keep_vars=True)
        if any(isinstance(value, DTensor) for value in found.values()):
            return found
        self._found = found
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"weights": self.weights, "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.num_updates = state_dict["num_updates"]
        for key, value in state_dict["weights"].items():
            self.weights[key].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into what is trained for the block, and its own back after."""
        trained_weights = {key: value.clone() for key, value in self.trained.state_dict().items()}
        self.trained.load_state_dict(self.weights)
        try:
            yield
        finally:
            self.trained.load_state_dict(trained_weights)


def learning_rate_factor(
    iteration: int, settings: LoopSettings, iterations: int | None = None
) -> float:
    """Return the factor of the peak learning rate at an iteration, in [0, 1].

    The rate rises linearly over the warm-up, stays constant, and falls to `final_rate` along a
    cosine (arXiv 1608.03983) or a line, over the last `decay_share` of the iterations. Restarts
    divide these into arcs of equal length, each of which begins at the peak.

    Args:
        iteration: counts from 0.
        settings: say how the rate moves.
        iterations: how many there are, if not as many as in the settings (`Pace`).
    """
    if iteration < settings.warmup_iterations:
        return (iteration + 1) / settings.warmup_iterations
    progress = _decay_progress(iteration, settings, iterations or settings.iterations)
    if progress == 0:
        return 1.0
    is_linear = settings.schedule == "linear"
    height = 1 - progress if is_linear else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_rate + (1 - settings.final_rate) * height


def _decay_progress(iteration: int, settings: LoopSettings, iterations: int) -> float:
    """Return how much of the decay, or of its present arc, is over at an iteration, in [0, 1]."""
    num_decaying = settings.decay_share * iterations
    if settings.schedule in ("cosine", "linear"):
        # It begins at the peak, which is the end of the warm-up or later.
        after_warmup = max(0, iterations - settings.warmup_iterations)
        num_decaying = min(num_decaying or after_warmup, after_warmup)
    num_left = max(0, iterations - iteration)
    if num_decaying <= num_left:
        return 0.0
    if settings.restarts and num_left > 0:
        return (num_decaying - num_left) * (settings.restarts + 1) / num_decaying % 1
    return 1 - num_left / num_decaying


@dataclass(frozen=True)
class Periodic:
    """Something that is done every so many iterations, beside checkpoints.

    Args:
        name: of it, for the time that it takes.
        every: iterations between two times; None for never.
        act: does it; called with the number of iterations done.
        is_done: whether it was done at that number already, before the run was stopped.
        at_start: whether to do it before the first iteration too.
    """

    name: str
    every: int | None
    act: Callable[[int], None]
    is_done: Callable[[int], bool]
    at_start: bool = False

    def is_due(self, num_done: int) -> bool:
        """Tell whether it is to be done after so many iterations."""
        if self.every is None or (num_done == 0 and not self.at_start):
            return False
        return num_done % self.every == 0


class Pace:
    """How many iterations a training has: those of its settings, or what fits `limit_seconds`.

    How long they take is looked at whenever figures are logged, until the rate begins to decay: up
    to there a training of fewer iterations is the same one. Afterwards the number stands.
    """

    def __init__(self, settings: LoopSettings) -> None:
        """Expect to have time for all iterations."""
        self.settings = settings
        self.iterations = settings.iterations
        self._spent = 0.0
        self._before = 0.0
        self._first: tuple[int, float] | None = None

    def begin(self) -> None:
        """Begin a call, whose seconds come on top of those spent before."""
        self._before = self._spent
        self._first = None

    def look(self, num_done: int, seconds: float) -> None:
        """Take in how long the iterations of this call have taken.

        Args:
            num_done: iterations that are done, those of earlier calls included.
            seconds: since this call began, with all that was done between iterations.
        """
        limit = self.settings.limit_seconds
        self._spent = self._before + seconds
        if limit is None:
            return
        if self._first is None:
            # What comes first is slow: kernels are chosen and blocks compiled.
            self._first = (num_done, seconds)
            return
        if learning_rate_factor(num_done, self.settings, self.iterations) < 1:
            return
        num_before, seconds_before = self._first
        each = (seconds - seconds_before) / (num_done - num_before)
        num_left = int((_SHARE_OF_LIMIT * limit - self._spent) / each)
        self.iterations = min(self.settings.iterations, num_done + max(1, num_left))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"iterations": self.iterations, "spent": self._spent}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned; more iterations or time in the settings count."""
        self._spent = float(state_dict["spent"])
        if self.settings.limit_seconds is not None:
            self.iterations = min(self.settings.iterations, int(state_dict["iterations"]))


class _Clock:
    """When it is time for a checkpoint that no number of iterations asks for."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def is_due(self) -> bool:
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def restart(self) -> None:
        self._last = time.monotonic()


def run_loop(
    iterate: Callable[[int, Randomness], Figures],
    settings: LoopSettings,
    folder: RunFolder,
    name: str,
    state: Mapping[str, Stateful],
    *,
    means: Mapping[str, Means] | None = None,
    checkpoint_start: bool = False,
    only_examined: bool = False,
    periodic: Sequence[Periodic] = (),
    pace: Pace | None = None,
    read_every: int = 1,
    check: Callable[[int, dict[str, float]], None] = lambda iteration, figures: None,
    on_iteration: OnIteration = lambda iteration, figures: None,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Call `iterate(iteration, randomness) -> figures` until the iterations of `settings` are done.

    If the folder holds a checkpoint of this name, `state` is restored from it and the loop goes on
    after it.

    Args:
        iterate: does one iteration and returns its figures, for instance its loss.
        settings: number of iterations, seed, and how often to log and to save.
        folder: the run folder that takes checkpoints and the log.
        name: of the checkpoint, and of these figures in the log.
        state: everything that a checkpoint keeps, by name.
        means: of figures that the caller takes, by name; a checkpoint keeps them too, and one of an
            older version may lack them.
        checkpoint_start: whether to save the state before the first iteration too.
        only_examined: whether to go on from the last checkpoint that `on_checkpoint` let pass,
            rather than from a later one that was written because training was asked to stop.
        periodic: what else is done every so many iterations, before the checkpoint of the same
            iteration. What a stop came before is done when the run goes on.
        pace: how many iterations there are, for a caller that has to know it; of its own if none.
        read_every: iterations between two moments at which figures that are tensors become numbers,
            beside those of the log and of checkpoints: reading one waits for its device.
        check: called with every iteration, from 0, and its figures once they are numbers, before
            they are logged and before a checkpoint; what it raises ends the training.
        on_iteration: called after every iteration with figures averaged over all processes, the
            last ones that were read.
        on_checkpoint: called before every checkpoint; if it raises, the checkpoint is not saved.

    Raises:
        StoppedError: Ctrl-C, SIGTERM or the folder's deadline asked to stop after an iteration,
            whose checkpoint was written, without `on_checkpoint`: if that was due there, it is
            called when the run goes on.
    """
    pace = pace or Pace(settings)
    unread = UnreadFigures()
    latest: dict[str, float] = {}

    def save_checkpoint(num_done: int, *, examined: bool = True) -> None:
        states = {key: holder.state_dict() for key, holder in {**state, **all_means}.items()}
        if settings.limit_seconds is not None:
            states[_PACE] = pace.state_dict()
        folder.save(
            name,
            {"iteration": num_done, _EXAMINED: examined, **states},
            keep=settings.keep_checkpoints,
            examined=examined,
            later=True,
        )
        clock.restart()

    def is_regular(num_done: int) -> bool:
        every = (read_every, settings.log_every, settings.checkpoint_every)
        return num_done >= pace.iterations or any(num_done % each == 0 for each in every)

    def read() -> None:
        """Take in what is unread."""
        nonlocal latest
        taken = unread.taken()
        means = averaged([figures for _, figures in taken])
        for (iteration, _), figures in zip(taken, means, strict=True):
            latest = figures
            check(iteration, latest)
            logged.add(latest)

    clock = _Clock(settings.checkpoint_seconds)
    logged = Means()
    all_means = {_MEANS: logged, **(means or {})}
    found = _resume(folder, name, state, all_means, pace, only_examined=only_examined)
    start = 0 if found is None else found.num_done
    pace.begin()
    if found is None and checkpoint_start:
        save_checkpoint(0)
    started_at = time.monotonic()
    try:
        with stop_requests(folder.deadline) as stop:
            for each in periodic:
                if each.is_due(start) and not each.is_done(start):
                    each.act(start)
            if found and not found.is_examined and start % settings.checkpoint_every == 0:
                on_checkpoint(start)
                save_checkpoint(start)
            num_done = start
            while num_done < pace.iterations:
                begun_at = time.monotonic()
                randomness = Randomness.at(settings.seed, num_done, name)
                unread.add(num_done, iterate(num_done, randomness))
                stop.took("iteration", time.monotonic() - begun_at)
                num_done += 1
                begun_at = time.monotonic()
                exit_code, saves = _agreed(stop, clock)
                if is_regular(num_done) or exit_code or saves:
                    read()
                stop.took("reading", time.monotonic() - begun_at)
                on_iteration(num_done, latest)
                if num_done % settings.log_every == 0:
                    # Of the slowest, so that all have as many iterations left.
                    (elapsed,) = largest([time.monotonic() - started_at])
                    pace.look(num_done, elapsed)
                    folder.log(
                        part=name,
                        iteration=num_done,
                        **logged.taken(),
                        **{SECONDS: round(elapsed / (num_done - start), 4)},
                    )
                is_last = num_done >= pace.iterations
                if is_last or not exit_code:
                    _act(periodic, num_done, stop)
                begun_at = time.monotonic()
                if exit_code:
                    # Whoever asked to stop may not wait for what `on_checkpoint` does.
                    save_checkpoint(num_done, examined=False)
                saves = saves or num_done % settings.checkpoint_every == 0
                if is_last or (saves and not exit_code):
                    on_checkpoint(num_done)
                    save_checkpoint(num_done)
                    stop.took("checkpoint", time.monotonic() - begun_at)
                if exit_code:
                    folder.finish_writing()
                    raise StoppedError(
                        f"{name} stopped after iteration {num_done} of {pace.iterations}. "
                        "Its checkpoint is written, and the same command goes on.",
                        exit_code,
                    )
    finally:
        folder.finish_writing()


def _act(periodic: Sequence[Periodic], num_done: int, stop: StopRequest) -> None:
    """Do what is due after so many iterations, and take in how long it took."""
    for each in periodic:
        if each.is_due(num_done):
            begun_at = time.monotonic()
            each.act(num_done)
            stop.took(each.name, time.monotonic() - begun_at)


class Means:
    """The means of figures since they were last taken, each over the iterations that have it.

    Not every role takes a step in every iteration. A checkpoint keeps them, for it may come between
    two of the moments at which they are taken.
    """

    def __init__(self) -> None:
        """Start without any figure."""
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def add(self, figures: Mapping[str, float]) -> None:
        """Take in the figures of one iteration."""
        for key, value in figures.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._counts.update(figures.keys())

    def taken(self) -> dict[str, float]:
        """Return the mean of every figure, and begin anew."""
        means = {key: value / self._counts[key] for key, value in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know."""
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Restore what `state_dict` returned."""
        self._sums = dict(state_dict["sums"])
        self._counts = Counter({key: int(count) for key, count in state_dict["counts"].items()})


def _agreed(stop: StopRequest, clock: _Clock) -> tuple[int, bool]:
    """Return what all processes agree on after an iteration.

    These are the exit code if any of them is to stop, else 0, and whether it is time for a
    checkpoint by any clock.
    """
    stop.is_due()
    exit_code, saves = largest([float(stop.exit_code), float(clock.is_due())])
    if exit_code and stop.exit_code == 0:
        stop.exit_code = OUT_OF_TIME
    return stop.exit_code, saves > 0


def check_number(loss: float, name: str, iteration: int, settings: LoopSettings) -> None:
    """Raise TrainingError if a loss, averaged over all processes, is NaN or infinite.

    Args:
        loss: of an iteration, which may be over for a while.
        name: of the loss, for the message.
        iteration: for the message.
        settings: for the message, which says what could be changed.
    """
    if math.isfinite(loss):
        return
    raise TrainingError(
        f"The {name} loss is {loss} at iteration {iteration}. The last checkpoint is whole: "
        f"lower learning_rate (now {settings.learning_rate:g}) or set precision to fp32, and run "
        "the command again; it goes on from there."
    )


@dataclass(frozen=True)
class _Found:
    """What a training goes on from: after how many iterations, and whether that was examined."""

    num_done: int
    is_examined: bool


def _resume(
    folder: RunFolder,
    name: str,
    state: Mapping[str, Stateful],
    means: Mapping[str, Means],
    pace: Pace,
    *,
    only_examined: bool,
) -> _Found | None:
    """Restore `state` from a checkpoint, and return its iteration and whether it was examined.

    None if there is none. A function of its own, so that the loop does not hold the loaded tensors
    while it runs.
    """
    checkpoint = folder.load(name, only_examined=only_examined)
    if checkpoint is None:
        return None
    for key, holder in state.items():
        holder.load_state_dict(checkpoint[key])
    # Older versions did not keep all of the means.
    for key in means.keys() & checkpoint.keys():
        means[key].load_state_dict(checkpoint[key])
    if _PACE in checkpoint:
        pace.load_state_dict(checkpoint[_PACE])
    return _Found(int(checkpoint["iteration"]), bool(checkpoint.get(_EXAMINED, True)))
