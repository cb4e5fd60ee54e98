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

from twostep.diffusion import landing
from twostep.distill.methods.adversarial import BETAS, AdversarialSettings
from twostep.distill.methods.discriminator import Discriminator
from twostep.distill.pairs import trained_times
from twostep.distill.recipe import DistillRecipe, Stage
from twostep.distill.roles import weights_of
from twostep.distill.trainer import StageTrainer
from twostep.evaluate.attributes import STYLES
from twostep.models.bundle import Bundle, load_bundle
from twostep.networks.adapters import Lora, activate, add_lora
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.pretrain.drawings import built_in_concepts
from twostep.pretrain.latents import EmojiSource, LatentCache
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
    bare = bare_loop(stage, make_models(bundle, stage))
    trainer = StageTrainer(stage, models.source, models.teacher, models.student)

    def iterate(number: int) -> object:
        return trainer.iterate(number, Randomness.at(stage.seed, number))

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
    processor, wall = time.process_time(), time.perf_counter()
    loop(number)
    return time.process_time() - processor, time.perf_counter() - wall


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
    teacher, student = (
        replace(bundle.denoiser.with_network(network), lora=name) for name in ("teacher", "student")
    )
    names = tuple((concept.names, concept.subgroup) for concept in built_in_concepts())
    width, height = bundle.contract.sizes[0]
    latents = torch.randn(
        512, *bundle.latent_shape(width, height), generator=torch.Generator().manual_seed(0)
    )
    cache = LatentCache(
        latents.half(), torch.zeros(512, 3, dtype=torch.uint8), names, tuple(STYLES)
    )
    return Models(EmojiSource(cache, bundle.text, width, height), teacher, student)


def bare_loop(stage: Stage, models: Models) -> Callable[[int], None]:
    """Return an iteration written down for this stage alone, with teacher and student on bases of
    their own.
    """
    schedule = models.student.schedule
    alphas = schedule.alphas.float().view(-1, 1, 1, 1)
    sigmas = schedule.sigmas.float().view(-1, 1, 1, 1)
    times = torch.tensor(trained_times(stage.student_steps))
    student = models.student.network
    teacher = copy.deepcopy(student)
    activate(student, "student")
    activate(teacher, "teacher")
    settings = stage.method
    adversarial = isinstance(settings, AdversarialSettings)
    assert stage.teacher_steps is not None
    num_teacher_steps = stage.teacher_steps // stage.student_steps
    betas = BETAS if adversarial else (0.9, 0.999)
    adam = partial(torch.optim.AdamW, betas=betas, fused=True)
    optimiser = adam(weights_of(models.student).parameters(), lr=stage.learning_rate)
    if adversarial:
        judge = Discriminator(models.teacher, conditional=settings.objective == "conditional")
        judge_rate = settings.discriminator_learning_rate or stage.learning_rate
        judge_optimiser = adam(judge.parameters(), lr=judge_rate)
        activate(student, "student")

    def walk(
        network: nn.Module, x: Tensor, t: Tensor, s: Tensor, conditioning: Conditioning
    ) -> Tensor:
        added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
        eps = network(x, t - 1, conditioning.text, added_cond_kwargs=added, return_dict=False)[
            0
        ].float()
        return alphas[s] * ((x - sigmas[t] * eps) / alphas[t]) + sigmas[s] * eps

    def descend(loss: Tensor, optimiser: Any) -> None:
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def iterate(number: int) -> None:
        draw = Randomness.at(stage.seed, number)
        with stage.autocast():
            x0, conditioning = models.source.draw(stage.batch_size, draw.tensors, draw.words)
            t = times[torch.randint(len(times), (stage.batch_size,), generator=draw.tensors)]
            noise = torch.randn(x0.shape, generator=draw.tensors)
            x_t = torch.where(
                (t == 1000).view(-1, 1, 1, 1), noise, alphas[t] * x0 + sigmas[t] * noise
            )
            real, now = x_t, t
            with torch.no_grad():
                for _ in range(num_teacher_steps):
                    then = landing(now, stage.teacher_steps)
                    real, now = walk(teacher, real, now, then, conditioning), then
            fake = walk(student, x_t, t, now, conditioning)
            if not adversarial:
                return descend((fake - real).square().mean(), optimiser)
            parts, at = [real, fake.detach()], [now, now]
            if judge.conditional:
                parts, at = [*parts, x_t], [*at, t]
            many = Conditioning.cat([conditioning] * len(parts))
            seen = judge.features(torch.cat(parts), torch.cat(at), many).chunk(len(parts))
            before = seen[2] if judge.conditional else None
            loss = (
                softplus(-judge.judge(before, seen[0])).mean()
                + softplus(judge.judge(before, seen[1])).mean()
            )
            descend(loss, judge_optimiser)
            judge.requires_grad_(False)
            with torch.no_grad():
                before = judge.features(x_t, t, conditioning) if judge.conditional else None
            after = judge.features(fake, now, conditioning)
            descend(softplus(-judge.judge(before, after)).mean(), optimiser)
            judge.requires_grad_(True)

    return iterate


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
            discriminator.head,
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
