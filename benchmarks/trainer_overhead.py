"""What the trainer costs beside the networks that it trains, on nano's LoRA recipe.

    python benchmarks/trainer_overhead.py [--student-steps 4] [--rounds 24]

Two measures, both wanted under 5 %. *Outside*: the share of an iteration spent neither in a
network's forward nor in a backward pass; the optimisers, which no loop does without, stand apart.
*Overhead*: what an iteration takes longer than a bare loop, written down below: the same draws, the
same calls of the same networks, the same optimisers, and no adapters to switch, no clipping, no
average, no checks, no figures.

Both run in turn, in changing order, on one thread, and each pair gives one ratio of processor time,
so what else the machine does hardly matters. The latents are noise, for pictures are not needed to
know the time.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import softplus

from twostep.diffusion import landing, trained_times
from twostep.distill.methods.adversarial import BETAS
from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.methods.lightning import LightningSettings
from twostep.distill.pairs import Transition
from twostep.distill.recipe import DistillRecipe, Stage
from twostep.distill.roles import weights_of
from twostep.distill.trainer import StageTrainer
from twostep.evaluate.attributes import STYLES
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.adapters import Lora, activate, add_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.drawings import built_in_concepts
from twostep.pretrain.latents import LatentCache, LatentSource
from twostep.training.loop import Randomness
from twostep.training.recipe import load_recipe

TARGET_PERCENT = 5
NUM_WARM = 3


def main(
    recipe: Annotated[
        str, typer.Option(help="A recipe whose stages train LoRAs without guidance.")
    ] = "nano-lora",
    student_steps: Annotated[int, typer.Option(help="Measure the stages of this student.")] = 4,
    rounds: Annotated[int, typer.Option(help="Pairs of iterations for each stage.")] = 24,
) -> None:
    """Measure every stage of one student and print a table."""
    torch.set_num_threads(1)
    settings = load_recipe(recipe, DistillRecipe)
    bundle = load_bundle(settings.model)
    typer.echo(
        "| stage | batch | iterations per second "
        "| forward | backward | optimisers | outside | overhead |"
    )
    typer.echo("|---|---:|---:|---:|---:|---:|---:|---:|")
    for stage in settings.stages:
        if stage.student_steps == student_steps:
            typer.echo(measure(stage, bundle, rounds))
    typer.echo(
        f"\nOverhead: median (quartiles) of {rounds} pairs. "
        f"Wanted: outside and overhead under {TARGET_PERCENT} %."
    )


def measure(stage: Stage, bundle: Bundle, rounds: int) -> str:
    """Return the row of one stage."""
    models = make_models(bundle, stage)
    bare = BareLoop(stage, make_models(bundle, stage))
    trainer = StageTrainer(stage, models.source, models.teacher, models.student)

    def iterate(number: int) -> object:
        return trainer.iterate(number, Randomness.at(stage.seed, number, stage.name))

    for number in range(NUM_WARM):
        iterate(number)
        bare(number)
    ratios = []
    seconds = []
    for number in range(NUM_WARM, NUM_WARM + rounds):
        order = (iterate, bare) if number % 2 else (bare, iterate)
        taken = {loop: clock(loop, number) for loop in order}
        seconds.append(taken[iterate][1])
        ratios.append(100 * (taken[iterate][0] / taken[bare][0] - 1))
    shares = share_out(
        trainer,
        models.source,
        lambda: [clock(iterate, NUM_WARM + number) for number in range(rounds)],
    )
    low, middle, high = statistics.quantiles(ratios, n=4)
    parts = " | ".join(
        f"{shares[part]:.1f} %" for part in ("forward", "backward", "optimisers", "outside")
    )
    speed = 1 / statistics.median(seconds)
    overhead = f"{middle:.1f} % ({low:.1f} to {high:.1f})"
    return f"| {stage.name} | {stage.batch_size} | {speed:.2f} | {parts} | {overhead} |"


def clock(loop: Callable[[int], object], number: int) -> tuple[float, float]:
    """Return the seconds one iteration takes: the processor's, and the wall's."""
    processor_start = time.process_time()
    wall_start = time.perf_counter()
    loop(number)
    return time.process_time() - processor_start, time.perf_counter() - wall_start


@dataclass(frozen=True, eq=False)
class Models:
    """What a stage works with."""

    source: Any
    teacher: Denoiser
    student: Denoiser


def make_models(bundle: Bundle, stage: Stage) -> Models:
    """Return models as the chain makes them: teacher and student are adapters on one base, a copy
    of the bundle's.
    """
    network = copy.deepcopy(bundle.denoiser.network)
    assert stage.lora_rank is not None
    assert stage.guidance == 1
    for name in ("teacher", "student"):
        adapter = add_lora(network, name, rank=stage.lora_rank)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(
                    0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                )
    Lora(network, "student").requires_grad_(True)
    base = bundle.denoiser.with_network(network)
    return Models(
        source=random_source(bundle),
        teacher=replace(base, lora="teacher"),
        student=replace(base, lora="student"),
    )


def random_source(bundle: Bundle) -> LatentSource:
    """Return noise for the latents of a built-in model, with captions that are encoded when drawn,
    as those of the drawings are.
    """
    names = tuple((concept.names, concept.subgroup) for concept in built_in_concepts())
    width, height = bundle.contract.sizes[0]
    latents = torch.randn(
        512, *bundle.latent_shape(width, height), generator=torch.Generator().manual_seed(0)
    )
    cache = LatentCache(
        latents.half(), torch.zeros(512, 3, dtype=torch.uint8), names, tuple(STYLES)
    )
    return LatentSource(cache, bundle.text, width, height)


class BareLoop:
    """Iterations written down for one stage alone, with teacher and student on bases of their own.

    Calling it with the number of an iteration does that iteration.
    """

    def __init__(self, stage: Stage, models: Models) -> None:
        """Copy the teacher, and make the discriminator, if there is one, and the optimisers."""
        assert stage.teacher_steps is not None
        self.stage = stage
        self.teacher_steps = stage.teacher_steps
        self.source = models.source
        schedule = models.student.schedule
        self.alphas = schedule.alphas.float().view(-1, 1, 1, 1)
        self.sigmas = schedule.sigmas.float().view(-1, 1, 1, 1)
        self.times = torch.tensor(trained_times(stage.student_steps))
        self.student = models.student.network
        self.teacher = copy.deepcopy(self.student)
        settings = stage.method
        is_adversarial = isinstance(settings, LightningSettings)
        betas = BETAS if is_adversarial else (0.9, 0.999)
        adam = partial(torch.optim.AdamW, betas=betas, fused=True)
        self.optimiser = adam(weights_of(models.student).parameters(), lr=stage.learning_rate)
        self.discriminator: Discriminator | None = None
        if is_adversarial:
            conditional = settings.objective == "conditional"
            self.discriminator = Discriminator(models.teacher, conditional=conditional)
            rate = settings.discriminator_learning_rate or stage.learning_rate
            self.discriminator_optimiser = adam(self.discriminator.parameters(), lr=rate)
        activate(self.student, "student")
        activate(self.teacher, "teacher")

    def __call__(self, number: int) -> None:
        """Do one iteration."""
        random = Randomness.at(self.stage.seed, number, self.stage.name)
        with self.stage.autocast():
            x_t, t, conditioning = self.draw(random)
            real = x_t
            s = t
            with torch.no_grad():
                for _ in range(self.teacher_steps // self.stage.student_steps):
                    lower = landing(s, self.teacher_steps)
                    real = self.step(self.teacher, real, s, lower, conditioning)
                    s = lower
            fake = self.step(self.student, x_t, t, s, conditioning)
            if self.discriminator is None:
                descend((fake - real).square().mean(), self.optimiser)
            else:
                taken = Transition(x_t=x_t, x_s=fake, t=t, s=s, conditioning=conditioning)
                self.train_adversarially(self.discriminator, taken, real)

    def draw(self, random: Randomness) -> tuple[Tensor, Tensor, Conditioning]:
        """Return noisy latents x_t at random times t, and the conditioning of their items."""
        count = self.stage.batch_size
        x0, conditioning = self.source.draw(count, random.tensors, random.words)
        t = self.times[torch.randint(len(self.times), (count,), generator=random.tensors)]
        noise = torch.randn(x0.shape, generator=random.tensors)
        noisy = self.alphas[t] * x0 + self.sigmas[t] * noise
        return torch.where((t == 1000).view(-1, 1, 1, 1), noise, noisy), t, conditioning

    def step(
        self, network: nn.Module, x: Tensor, t: Tensor, s: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Return x at s, one step of the flow from x at t; the network predicts eps."""
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
        output = network(x, t - 1, conditioning.text, added_cond_kwargs=added, return_dict=False)
        eps = output[0].float()
        x0 = (x - self.sigmas[t] * eps) / self.alphas[t]
        return self.alphas[s] * x0 + self.sigmas[s] * eps

    def train_adversarially(
        self, discriminator: Discriminator, taken: Transition, real: Tensor
    ) -> None:
        """Let the discriminator take a step, then the student."""
        latents = [real, taken.x_s.detach()]
        times = [taken.s, taken.s]
        if discriminator.conditional:
            latents.append(taken.x_t)
            times.append(taken.t)
        many = Conditioning.cat([taken.conditioning] * len(latents))
        features = discriminator.features(torch.cat(latents), torch.cat(times), many)
        real_features, fake_features, *rest = zip(
            *(level.chunk(len(latents)) for level in features), strict=True
        )
        before = rest[0] if rest else None
        loss_of_real = softplus(-discriminator.judge(before, real_features)).mean()
        loss_of_fake = softplus(discriminator.judge(before, fake_features)).mean()
        descend(loss_of_real + loss_of_fake, self.discriminator_optimiser)
        discriminator.requires_grad_(False)
        if discriminator.conditional:
            with torch.no_grad():
                before = discriminator.features(taken.x_t, taken.t, taken.conditioning)
        after = discriminator.features(taken.x_s, taken.s, taken.conditioning)
        descend(softplus(-discriminator.judge(before, after)).mean(), self.optimiser)
        discriminator.requires_grad_(True)


def descend(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    """Take one step of an optimiser, without clipping."""
    loss.backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def share_out(
    trainer: StageTrainer, source: Any, run: Callable[[], list[tuple[float, float]]]
) -> dict[str, float]:
    """Return the percentages of the processor's time that `run` spends in the parts of an
    iteration.
    """
    spent = {"forward": 0.0, "backward": 0.0, "optimisers": 0.0}
    began: list[float] = []

    def enter(*given: object) -> None:
        began.append(time.process_time())

    def leave(part: str) -> None:
        taken = time.process_time() - began.pop()
        if not began:  # parts inside parts are counted once
            spent[part] += taken

    backward = Tensor.backward

    def timed(*given: Any, **named: Any) -> None:
        enter()
        backward(*given, **named)
        leave("backward")

    networks: list[nn.Module] = [trainer.models["student"].network, *source.text.encoders]
    if "discriminator" in trainer.models:
        discriminator = trainer.models["discriminator"]
        encoder = discriminator.encoder  # which is never called as a whole
        networks += [
            encoder.conv_in,
            encoder.time_embedding,
            encoder.add_embedding,
            *encoder.down_blocks,
            encoder.mid_block,
            *discriminator.heads,
        ]
    optimisers = list(trainer.optimisers.values())
    with ExitStack() as leaving:
        leaving.enter_context(mock.patch.object(Tensor, "backward", timed))
        hooks = [network.register_forward_pre_hook(enter) for network in networks]
        hooks += [
            network.register_forward_hook(lambda *given: leave("forward")) for network in networks
        ]
        hooks += [optimiser.register_step_pre_hook(enter) for optimiser in optimisers]
        hooks += [
            optimiser.register_step_post_hook(lambda *given: leave("optimisers"))
            for optimiser in optimisers
        ]
        for hook in hooks:
            leaving.callback(hook.remove)
        total = sum(processor for processor, _ in run())
    shares = {part: 100 * seconds / total for part, seconds in spent.items()}
    return shares | {"outside": 100 - sum(shares.values())}


if __name__ == "__main__":
    typer.run(main)
