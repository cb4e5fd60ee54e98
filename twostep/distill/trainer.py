"""The trainer of one stage, the same for every method: draw a pair, then one step of each turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from twostep.distill.health import Health, Monitor
from twostep.distill.pairs import Batches, Source
from twostep.distill.recipe import TrainedStage
from twostep.distill.roles import Weights, move_average
from twostep.media.codec import Codec
from twostep.networks.adapters import Lora
from twostep.training.compiling import REPEATED, compile_blocks, run_as_written, uncompiled
from twostep.training.device import has_own_memory
from twostep.training.figures import Figures
from twostep.training.loop import (
    MovingAverage,
    OnIteration,
    Pace,
    Periodic,
    Randomness,
    TrainingError,
    check_number,
    hashed_seed,
    learning_rate_factor,
    run_loop,
)
from twostep.training.offload import OffloadedState
from twostep.training.optimiser import (
    OptimiserState,
    effective_rate,
    go_back,
    make_optimiser,
    step_down,
)
from twostep.training.processes import world
from twostep.training.replicas import Replica
from twostep.training.run_folder import RunFolder
from twostep.training.shards import shard

STUDENT = "student"
"""The role that every stage trains, and whose averaged weights are the result."""

OnCheckpoint = Callable[[int], dict[str, float]]
"""Called before a checkpoint with the number of iterations done, while the student has its averaged
weights; returns how it looks (`health.measure`).
"""


class StageTrainer:
    """Everything that changes during a stage, and one iteration of it.

    Attributes:
        method: of the stage.
        roles: the networks that change, by name.
        models: what the method computes with, by role, the teacher included.
        optimisers: of the roles that learn by gradient, by role.
        average: of the student's weights.
        rate: a factor of every learning rate, beside warm-up and decay.
        pace: how many iterations there are.
        state: what a checkpoint keeps, by name.
    """

    def __init__(
        self,
        stage: TrainedStage,
        source: Source,
        teacher: Any,
        student: Any,
        *,
        sharded: bool = False,
        codec: Codec | None = None,
    ) -> None:
        """Make the method's networks and the optimisers.

        Args:
            stage: what to do.
            source: of the examples.
            teacher: frozen; a denoiser, or what else the method's roles are made of.
            student: trained in place: of a denoiser its LoRA if it has one, or else its network.
            sharded: whether to spread the method's own networks over all processes. The student's
                is already, if so.
            codec: of the teacher, for methods that look at media.
        """
        self.stage = stage
        self.method = stage.make_method()
        # Fresh layers, as a discriminator's head, start at random.
        torch.manual_seed(hashed_seed(stage.seed, stage.name))
        self.roles = dict(self.method.roles(teacher, student))
        # The student need not be of this package.
        device = next(iter(self.roles[STUDENT].weights.parameters())).device
        self.batches = Batches(source, stage.batch_size, device, codec)
        if sharded:
            self._shard()
        models = {name: role.model for name, role in self.roles.items()}
        self.models: Mapping[str, Any] = {"teacher": teacher, **models}
        self._networks = list(filter(None, map(_network_of, self.models.values())))
        if stage.compile:
            for network in self._networks:
                compile_blocks(network, REPEATED)
        self.optimisers = self._make_optimisers()
        self._stepping = {
            name: self._make_stepping(name, optimiser)
            for name, optimiser in self.optimisers.items()
        }
        self._replicas = {name: Replica(self.roles[name].weights) for name in self.optimisers}
        self.average = MovingAverage(self.roles[STUDENT].weights, stage.ema_decay)
        self.rate = 1.0
        self.pace = Pace(stage)
        self.state = self._make_state()

    def _shard(self) -> None:
        for name, role in self.roles.items():
            if name != STUDENT and isinstance(role.weights, nn.Module):
                shard(role.weights, methods=role.sharded_methods)

    def _make_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        optimisers = {}
        for name, role in self.roles.items():
            if role.optimiser is not None:
                optimisers[name] = make_optimiser(
                    role.weights,
                    role.optimiser.learning_rate,
                    betas=role.optimiser.betas,
                    weight_decay=role.optimiser.weight_decay,
                    eps=role.optimiser.eps,
                    name=role.optimiser.name,
                    group_rates=role.optimiser.group_rates,
                )
        return optimisers

    def _make_state(self) -> dict[str, Stateful]:
        state: dict[str, Stateful] = {"average": self.average}
        for name, role in self.roles.items():
            state[name] = role.weights
        for name, stepping in self._stepping.items():
            state[f"{name}_optimiser"] = stepping
        return state

    def _make_stepping(self, name: str, optimiser: torch.optim.Optimizer) -> OptimiserState:
        settings = self.roles[name].optimiser
        assert settings is not None
        if self.stage.offload and has_own_memory(self.batches.device):
            return OffloadedState(optimiser, settings.name)
        return OptimiserState(optimiser)

    def iterate(self, iteration: int, random: Randomness) -> Figures:
        """Do one iteration and return its figures, of which most are still on their device.

        Nothing in it waits for the device, but optimisers that look at numbers themselves (prodigy,
        adafactor).

        Args:
            iteration: counts from 0.
            random: the iteration's own.

        Returns:
            Of every role that took a step its `ROLE_loss`, its `ROLE_grad_norm` (before clipping),
            its `ROLE_rate` (of learning), and the method's own figures.
        """
        pairs = _Pairs(self, iteration, random)
        factor = self.rate * learning_rate_factor(iteration, self.stage, self.pace.iterations)
        figures: dict[str, float | Tensor] = {}
        with self._dropout(iteration):
            for name in self.method.turns(iteration):
                figures |= self._take_turn(name, iteration, pairs, factor)
        return figures

    def check(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Look at the figures of an iteration once they are numbers.

        Raises:
            TrainingError: a loss is not a finite number.
        """
        roles = {_loss_of(name): name for name in self.roles}
        # In the order of their turns: the first to go wrong is told.
        for key, value in figures.items():
            if key in roles:
                check_number(value, roles[key], iteration, self.stage)

    @contextmanager
    def _dropout(self, iteration: int) -> Iterator[None]:
        """Let the student's LoRA drop inputs in the block, the same ones whenever it is resumed."""
        lora = self.roles[STUDENT].weights
        dropout = self.stage.dropout
        if not isinstance(lora, Lora) or dropout == 0:
            yield
            return
        device = self.batches.device
        seed = hashed_seed(self.stage.seed, self.stage.name, iteration, "dropout", world().rank)
        # Dropout knows no generator but the global one, which is put back as it was.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            lora.dropout(dropout),
        ):
            torch.manual_seed(seed)
            yield

    def _take_turn(
        self, name: str, iteration: int, pairs: _Pairs, factor: float
    ) -> dict[str, float | Tensor]:
        """Let one role take a step, with all others frozen, and return its figures."""
        role = self.roles[name]
        # The student is left out: what shall not reach it is detached by the method, and a weight
        # that is frozen between its forward and its backward pass would get no gradient.
        bystanders = [
            other.weights
            for other_name, other in self.roles.items()
            if other.optimiser is not None and other_name not in (name, STUDENT)
        ]
        # Until the backward pass is over, in which checkpointed blocks are computed again.
        sums: dict[str, Tensor] = {}
        for part in range(self.stage.accumulate):
            # The pair is drawn, if it is not yet, before anything is frozen.
            pair = pairs[part]
            figures: dict[str, Tensor] = {}

            def compute(pair: Any = pair, figures: dict[str, Tensor] = figures) -> Tensor:
                with self._autocast():
                    losses = dict(self.method.loss(name, pair, self.models))
                total = losses.pop("total")
                for key, value in {_loss_of(name): total, **losses}.items():
                    figures[key] = value.detach()
                return total

            with _frozen(bystanders):
                is_last = part == self.stage.accumulate - 1
                total = self._replicas[name].loss(compute, is_last=is_last)
                go_back(total / self.stage.accumulate if self.stage.accumulate > 1 else total)
            for key, value in figures.items():
                sums[key] = sums[key] + value if key in sums else value
        norm = step_down(
            self._stepping[name], role.weights, clip=self.stage.gradient_clip, factor=factor
        )
        self._follow(name)
        means = {key: value / self.stage.accumulate for key, value in sums.items()}
        rate = effective_rate(self.optimisers[name])
        return {f"{name}_grad_norm": norm, f"{name}_rate": rate, **means}

    def _follow(self, name: str) -> None:
        """Move every average of a role that has taken a step."""
        if name == STUDENT:
            self.average.update()
        for role in self.roles.values():
            if role.follow is not None and role.follow.role == name:
                current = self.roles[name].weights.state_dict()
                move_average(role.weights.state_dict(), current, role.follow.decay)

    def begin_with(self, handed_on: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Let roles begin where the stage before left them, and return the names of those.

        A role whose weights have another form than before, as where a LoRA became a network, begins
        anew.

        Args:
            handed_on: what `hand_on` returned at the end of the stage before.
        """
        begun = []
        for name, role in self.roles.items():
            state = handed_on.get(name)
            if role.handed_on is None or state is None:
                continue
            if role.handed_on.state_dict().keys() == state.keys():
                role.handed_on.load_state_dict(dict(state))
                begun.append(name)
        return begun

    def hand_on(self) -> dict[str, dict[str, Any]]:
        """Return what the next stage of the same student and method begins with, by role."""
        return {
            name: role.handed_on.state_dict()
            for name, role in self.roles.items()
            if role.handed_on is not None
        }

    def _autocast(self) -> Any:
        return self.stage.autocast(self.batches.device.type)

    def remove_roles(self) -> None:
        """Take what the method put on other networks off again, and let all run as written."""
        for role in self.roles.values():
            role.remove()
        if self.stage.compile:
            for network in self._networks:
                run_as_written(network)


class _Pairs:
    """The parts of an iteration's pair, drawn when they are first asked for.

    Where gradients are accumulated and only one role takes a turn, a part is forgotten once
    another is asked for, and with it its graph.
    """

    def __init__(self, trainer: StageTrainer, iteration: int, random: Randomness) -> None:
        self._trainer = trainer
        self._iteration = iteration
        self._random = random
        self._drawn: dict[int, Any] = {}
        self._keep = len(trainer.method.turns(iteration)) > 1

    def __getitem__(self, part: int) -> Any:
        if part not in self._drawn:
            if not self._keep:
                self._drawn.clear()
            self._drawn[part] = self._draw(part)
        return self._drawn[part]

    def _draw(self, part: int) -> Any:
        trainer = self._trainer
        num_parts = trainer.stage.accumulate
        batches = trainer.batches
        random = self._random
        if num_parts > 1:
            # Every part draws the whole batch's randomness, and computes its own items of it.
            batches = replace(batches, part=part, num_parts=num_parts)
            random = random.copy()
        with trainer._autocast():
            pair = trainer.method.draw(self._iteration, batches, trainer.models, random)
        if part == num_parts - 1:
            stage = trainer.stage
            trainer.batches.expect(Randomness.at(stage.seed, self._iteration + 1, stage.name))
        return pair


def train_stage(
    stage: TrainedStage,
    source: Source,
    teacher: Any,
    student: Any,
    folder: RunFolder,
    *,
    sharded: bool = False,
    codec: Codec | None = None,
    health: Health | None = None,
    continues: TrainedStage | None = None,
    is_continued: bool = False,
    periodic: Sequence[Periodic] = (),
    on_iteration: OnIteration = lambda iteration, figures: None,
    on_checkpoint: OnCheckpoint = lambda iteration: {},
) -> None:
    """Train a student in place; it ends with its averaged weights.

    The same call with the same folder resumes. Arguments beside those of `StageTrainer`:

    Args:
        stage: what to do.
        source: of the examples.
        teacher: frozen.
        student: trained in place.
        folder: takes checkpoints and log.
        sharded: whether the method's networks are spread over all processes.
        codec: of the teacher.
        health: limits, and what happens beyond them.
        continues: the stage before, if it trained the same student by the same method: what its
            roles hand on is where this one's begin.
        is_continued: whether the next stage continues this one.
        periodic: what is done with the student every so many iterations, while it has its averaged
            weights.
        on_iteration: called after every iteration.
        on_checkpoint: called before every checkpoint.

    Raises:
        TrainingError: a loss is no finite number, or health asks for a pause. The checkpoint before
            that is kept.
    """
    trainer = StageTrainer(stage, source, teacher, student, sharded=sharded, codec=codec)
    if continues is not None and (handed_on := folder.load(_handed_on(continues))):
        begun = trainer.begin_with(handed_on)
        folder.log(part=stage.name, continues=continues.name, goes_on=begun)
    monitor = Monitor(health or Health(), trainer.method.limits())
    run = _MonitoredRun(
        trainer,
        monitor,
        folder,
        periodic=periodic,
        on_iteration=on_iteration,
        on_checkpoint=on_checkpoint,
    )
    try:
        run.run()
        if is_continued and (states := trainer.hand_on()):
            folder.save(_handed_on(stage), states)
        trainer.roles[STUDENT].weights.load_state_dict(trainer.average.weights)
    finally:
        trainer.remove_roles()


def _handed_on(stage: TrainedStage) -> str:
    """Return under which name a run folder keeps what a stage hands on."""
    return f"{stage.name}-handed-on"


class _MonitoredRun:
    """A stage's loop under the eyes of a monitor, which may pause it or send it back."""

    def __init__(
        self,
        trainer: StageTrainer,
        monitor: Monitor,
        folder: RunFolder,
        *,
        periodic: Sequence[Periodic],
        on_iteration: OnIteration,
        on_checkpoint: OnCheckpoint,
    ) -> None:
        self.trainer = trainer
        self.monitor = monitor
        self.folder = folder
        self.periodic = [replace(each, act=self._with_average(each.act)) for each in periodic]
        self.on_iteration = on_iteration
        self.on_checkpoint = on_checkpoint
        self.name = trainer.stage.name
        self.pause_reason: str | None = None
        self.has_rolled_back = False

    def run(self) -> None:
        """Run the loop, again from the last checkpoint as often as the monitor allows."""
        if state := self.folder.load(f"{self.name}-health"):
            self.monitor.load_state_dict(state)
        while True:
            try:
                self._loop()
                return
            except TrainingError as error:
                if not self.monitor.roll_back():
                    raise
                self.has_rolled_back = True
                rate = self.monitor.rate
                self.folder.log(part=self.name, rolled_back=str(error), rate=rate)
                self.folder.save(f"{self.name}-health", self.monitor.state_dict())

    def _loop(self) -> None:
        self.trainer.rate = self.monitor.rate
        run_loop(
            self._iterate,
            self.trainer.stage,
            self.folder,
            name=self.name,
            state=self.trainer.state,
            means={"health_figures": self.monitor.figures},
            checkpoint_start=self.monitor.settings.action == "rollback",
            only_examined=self.has_rolled_back,
            periodic=self.periodic,
            pace=self.trainer.pace,
            read_every=self.trainer.stage.read_every(self.trainer.batches.device.type),
            check=self._check,
            on_iteration=self.on_iteration,
            on_checkpoint=self._examine,
        )

    def _iterate(self, iteration: int, random: Randomness) -> Figures:
        if self.pause_reason is not None:
            raise TrainingError(
                f"{self.name} paused at iteration {iteration}: {self.pause_reason}. "
                "The same command goes on."
            )
        return self.trainer.iterate(iteration, random)

    def _with_average(self, act: Callable[[int], None]) -> Callable[[int], None]:
        """Return the same function, with averaged weights in the student while it runs."""

        def act_with_average(num_done: int) -> None:
            with self.trainer.average.applied(), uncompiled():
                act(num_done)

        return act_with_average

    def _check(self, iteration: int, figures: dict[str, float]) -> None:
        self.trainer.check(iteration, figures)
        self.monitor.add(figures)

    def _examine(self, iteration: int) -> None:
        """Log how the student looks before a checkpoint, and act on what is wrong."""
        with self.trainer.average.applied(), uncompiled():
            looks = self.on_checkpoint(iteration)
        trouble = "; ".join(self.monitor.symptoms(looks))
        if not trouble:
            self.folder.log(part=self.name, iteration=iteration, **looks)
            return
        self.folder.log(part=self.name, iteration=iteration, **looks, trouble=trouble)
        action = self.monitor.settings.action
        if action == "rollback":
            raise TrainingError(f"{self.name} is ill at iteration {iteration}: {trouble}.")
        warnings.warn(f"{self.name}, iteration {iteration}: {trouble}", stacklevel=2)
        if action == "pause":
            self.pause_reason = trouble


def _network_of(model: Any) -> nn.Module | None:
    """Return the module that a method computes with; None of a model that is none and has none."""
    network = getattr(model, "network", model)
    return network if isinstance(network, nn.Module) else None


def _loss_of(role: str) -> str:
    """Return the name of the figure that a role minimises."""
    return f"{role}_loss"


@contextmanager
def _frozen(weights: Sequence[Weights]) -> Iterator[None]:
    """Let no gradient flow into weights during the block."""
    for each in weights:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in weights:
            each.requires_grad_(True)
