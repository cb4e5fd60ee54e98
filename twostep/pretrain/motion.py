"""A teacher of clips: a motion module that learns on a frozen picture teacher.

As in arXiv 2307.04725: the picture model stays as it is, and the module learns from clips by the
noise that it has to predict. Before that, a domain adapter may learn the words of motion on single
frames, for a module hears of a caption only what the picture model makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from twostep.diffusion.shapes import sent
from twostep.evaluate.motions import find_motion
from twostep.formats.motion_files import MotionConfig
from twostep.models.bundle import Bundle
from twostep.models.motion import load_pictures, motion_contract, picture_unet, with_motion
from twostep.networks.domain_adapter import DomainAdapter
from twostep.networks.motion import MotionModule, MotionUnet, TimeTransformer
from twostep.pretrain.clips import MovingDrawings
from twostep.pretrain.drawings import DrawingSet
from twostep.pretrain.loop import NetworkLoopSettings, silent, train_network
from twostep.pretrain.teacher import DenoiserSettings, noise_loss
from twostep.training.loop import OnIteration, Randomness
from twostep.training.processes import world
from twostep.training.recipe import Settings
from twostep.training.run_folder import RunFolder


class WordsSettings(Settings):
    """How a domain adapter learns the words of motion."""

    rank: int = Field(16, gt=0, description="of the adapter's matrices")
    weight: float = Field(
        0.1,
        gt=0,
        description="of the cross-entropy of linear probes, which tell the kind of motion from the "
        "features that the motion module reads, beside the predicted noise, on single frames",
    )
    weight_on_clips: float = Field(
        0.03, ge=0, description="the same while the motion module learns with the adapter"
    )
    loop: NetworkLoopSettings = Field(description="the training on single frames")


class LessonSettings(Settings):
    """Iterations with fewer kinds of motion and fewer drawings, at the beginning.

    What to do with a word of motion is found within some hundred iterations for two kinds of motion
    of one drawing, and was not within as many for all kinds of all drawings (docs/log.md).
    """

    iterations: int = Field(gt=0, description="how many")
    kinds: tuple[str, ...] = Field(min_length=1, description="of motion")
    concepts: int | None = Field(None, gt=0, description="the first so many; all if not given")
    styles: int | None = Field(None, gt=0, description="likewise")
    backgrounds: int | None = Field(None, gt=0, description="likewise")
    batch_size: int = Field(gt=0, description="examples per iteration")

    @field_validator("kinds")
    @classmethod
    def _check_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse kinds that there are not."""
        for kind in kinds:
            find_motion(kind)
        return kinds


class WholeSettings(Settings):
    """Iterations in between that compute all frames of a clip, at times of any noise."""

    every: int = Field(2, ge=1, description="after the lessons, one iteration of so many")
    batch_size: int = Field(gt=0, description="examples of such an iteration, of random kinds")


class MotionSettings(DenoiserSettings):
    """The recipe of a motion module."""

    part: Literal["motion"] = "motion"
    model: str = Field("nano", description="the picture teacher that it goes on")
    further_models: tuple[str, ...] = Field(
        (),
        description="picture models of the same shape that students of it are distilled on too; "
        "their text encoders and autoencoders are not used",
    )
    name: str = Field("nano-motion", description="what the teacher of clips is called")
    frames: int = Field(16, ge=2, description="of the clips that it learns from")
    max_frames: int = Field(32, ge=2, description="the longest clip that it can draw")
    frames_per_second: float = Field(8.0, gt=0, description="of the clips that it draws")
    frames_seen: int | None = Field(
        None,
        ge=1,
        description="frames of each clip that an iteration computes, drawn anew; all if not given",
    )
    kinds_together: bool = Field(
        False,
        description="every drawing of a batch comes in all kinds of motion, from the same noise: "
        "what they have in common cancels out of what a caption's words of motion learn; "
        "batch_size is then a multiple of the number of kinds",
    )
    high_noise_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the times that are drawn from the fifth of most noise, where only "
        "the caption can tell what moves where",
    )
    words: WordsSettings | None = Field(
        None, description="a domain adapter that learns the words of motion; none if not given"
    )
    lessons: tuple[LessonSettings, ...] = Field(
        (), description="iterations of the loop, the first ones, that show less; in their order"
    )
    whole_clips: WholeSettings | None = Field(
        None,
        description="iterations in between with whole clips, from which frames learn to be alike; "
        "none if not given",
    )
    heads: int = Field(8, gt=0, description="of each attention along time")
    guidance: float | None = Field(
        None, ge=1, description="that the teacher recommends; the picture teacher's if not given"
    )
    sample_prompts: tuple[str, ...] = Field(
        ("a 3d fox on a blue background, spinning",),
        min_length=1,
        description="drawn at every checkpoint",
    )
    sample_seeds: tuple[int, ...] = Field((0,), min_length=1, description="of each of these")


def new_motion_teacher(settings: MotionSettings, *, recipe: str, version: str) -> Bundle:
    """Return a picture teacher with a fresh motion module, which draws still clips so far.

    Args:
        settings: the recipe.
        recipe: its name, for the contract.
        version: of twostep, for the contract.

    Raises:
        ModelError: the picture model cannot be had, or takes no motion module.
    """
    pictures = load_pictures([settings.model, *settings.further_models])
    torch.manual_seed(settings.loop.seed)
    shape = MotionConfig.on(
        picture_unet(pictures[0]).config,
        heads=settings.heads,
        max_frames=max(settings.frames, settings.max_frames),
    )
    contract = motion_contract(pictures[0].contract, settings.name, recipe=recipe, version=version)
    if settings.guidance is not None:
        contract = replace(contract, guidance=settings.guidance)
    adapter = None
    if settings.words is not None:
        adapter = DomainAdapter.on(picture_unet(pictures[0]), settings.words.rank)
    return with_motion(
        pictures,
        MotionModule(shape),
        contract,
        frames=settings.frames,
        frames_per_second=settings.frames_per_second,
        adapter=adapter,
    )


def train_motion(
    drawings: DrawingSet,
    teacher: Bundle,
    settings: MotionSettings,
    folder: RunFolder,
    *,
    on_iteration: OnIteration = silent,
    on_checkpoint: Callable[[int], None] = lambda iteration: None,
) -> None:
    """Train a motion module, where it is, on clips of drawings that move.

    Args:
        drawings: what moves.
        teacher: of which the motion module alone is trained, in place.
        settings: the recipe.
        folder: the run's folder.
        on_iteration: called after every iteration with its figures.
        on_checkpoint: called before every checkpoint with the averaged weights in the teacher.
    """
    denoiser = teacher.denoiser
    backbone = denoiser.backbone
    assert isinstance(backbone, MotionUnet)
    clips = MovingDrawings(drawings, teacher, together=settings.kinds_together)
    lessons = _lessons(clips, settings)
    denoiser.checkpoint_gradients(settings.gradient_checkpointing)
    adapter = backbone.adapter
    trained: nn.Module = backbone.network
    loss = _ClipLoss(teacher, lessons, settings, settings.frames_seen)
    with ExitStack() as stack:
        if settings.words is not None and adapter is not None:
            adapter.to(denoiser.device)
            for base in backbone.bases:
                stack.enter_context(adapter.applied(base))
            probes = KindProbes.on(backbone.network, clips.kinds)
            _train_words(adapter, probes, clips, teacher, settings, folder, on_iteration)
            trained = nn.ModuleDict({"motion": backbone.network, "adapter": adapter})
            if settings.words.weight_on_clips:
                loss = replace(loss, probes=probes, weight=settings.words.weight_on_clips)
        backbone.network.requires_grad_(True)
        train_network(
            trained,
            loss,
            settings.loop,
            folder,
            name="motion",
            on_iteration=on_iteration,
            on_checkpoint=on_checkpoint,
        )


def _train_words(
    adapter: DomainAdapter,
    probes: KindProbes,
    clips: MovingDrawings,
    teacher: Bundle,
    settings: MotionSettings,
    folder: RunFolder,
    on_iteration: OnIteration,
) -> None:
    """Train a domain adapter on single frames; the motion module is fresh and changes nothing."""
    words = settings.words
    assert words is not None
    lessons = [_Lesson(clips, words.loop.batch_size)]
    loss = _ClipLoss(teacher, lessons, settings, 1, probes, words.weight)
    train_network(adapter, loss, words.loop, folder, name="words", on_iteration=on_iteration)


@dataclass(frozen=True, eq=False)
class KindProbes:
    """Linear probes of the kind of motion, at every place where the motion module reads features.

    At each place every kind has a direction, drawn once and fixed. Its score is the component along
    it of the features' mean, so to be told apart kinds must be strong in the features, not only
    separable.

    Attributes:
        norms: the first layers of the module's transformers, whose output is probed.
        directions: of the kinds, for each of these.
        kinds: their names.
    """

    norms: tuple[nn.Module, ...]
    directions: tuple[Float[Tensor, "_ kinds"], ...]
    kinds: tuple[str, ...]

    SCALE: ClassVar[float] = 2.0
    """Of the scores, which are logits."""

    @classmethod
    def on(cls, network: MotionModule, kinds: Sequence[str]) -> KindProbes:
        """Return the probes of a motion module, with the same directions in every run."""
        norms = [each.norm for each in network.modules() if isinstance(each, TimeTransformer)]
        generator = torch.Generator().manual_seed(0)
        directions = []
        for norm in norms:
            width = len(norm.weight)
            rows = torch.randn(width, width, generator=generator)
            directions.append(torch.linalg.qr(rows)[0][:, : len(kinds)].to(norm.weight.device))
        return cls(tuple(norms), tuple(directions), tuple(kinds))

    @contextmanager
    def read(self) -> Iterator[list[Float[Tensor, "clips kinds"]]]:
        """Yield a list that has, after a call in the block, the scores of every place."""
        scores: list[Tensor] = []

        def score(place: int, norm: nn.Module, inputs: object, out: Tensor) -> None:
            scores.append(self.SCALE * out.mean((2, 3, 4)) @ self.directions[place])

        handles = [
            norm.register_forward_hook(partial(score, place))
            for place, norm in enumerate(self.norms)
        ]
        try:
            yield scores
        finally:
            for handle in handles:
                handle.remove()

    def loss(
        self, scores: Sequence[Tensor], kinds: Sequence[str], captions: Sequence[str]
    ) -> Float[Tensor, ""]:
        """Return the mean cross-entropy of the kinds; clips with an empty caption count as 0."""
        rows = [place for place, caption in enumerate(captions) if caption]
        told = torch.tensor([self.kinds.index(kinds[row]) for row in rows], dtype=torch.long)
        losses = [
            functional.cross_entropy(each[rows], told.to(each.device), reduction="sum")
            for each in scores
        ]
        return torch.stack(losses).mean() / len(captions)


@dataclass(frozen=True, eq=False)
class _Lesson:
    """What iterations learn from.

    Attributes:
        clips: what is drawn.
        batch_size: how many of them.
        until: the iteration before which the lesson ends; None for one that does not.
        every: it comes every so many iterations.
        is_whole: whether all frames are computed, at times of any noise.
    """

    clips: MovingDrawings
    batch_size: int
    until: int | None = None
    every: int = 1
    is_whole: bool = False

    def comes_at(self, iteration: int) -> bool:
        """Tell whether it is an iteration's turn, if no lesson before has taken it."""
        has_time = self.until is None or iteration < self.until
        return has_time and iteration % self.every == self.every - 1


def _lessons(clips: MovingDrawings, settings: MotionSettings) -> list[_Lesson]:
    """Return what is learnt from in turn, all clips last."""
    lessons: list[_Lesson] = []
    until = 0
    for each in settings.lessons:
        until += each.iterations
        fewer = replace(
            clips,
            drawings=clips.drawings.first(each.concepts, each.styles),
            kinds=each.kinds,
            backgrounds=each.backgrounds or clips.backgrounds,
        )
        lessons.append(_Lesson(fewer, each.batch_size, until))
    whole = settings.whole_clips
    if whole is not None:
        mixed = replace(clips, together=False)
        lessons.append(_Lesson(mixed, whole.batch_size, every=whole.every, is_whole=True))
    return [*lessons, _Lesson(clips, settings.loop.batch_size)]


@dataclass(frozen=True, eq=False)
class _ClipLoss:
    """The loss of an iteration: `noise_loss` on clips, and that of the probes with a weight."""

    teacher: Bundle
    lessons: Sequence[_Lesson]
    settings: MotionSettings
    frames_seen: int | None
    probes: KindProbes | None = None
    weight: float = 0.0

    def __call__(self, iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        denoiser = self.teacher.denoiser
        device = denoiser.device
        lesson = next(each for each in self.lessons if each.comes_at(iteration))
        share = world().share(lesson.batch_size)
        numbers = None if lesson.is_whole else self._numbers(generator)
        x0, captions, kinds = lesson.clips.draw_frames(
            lesson.batch_size, generator, randomness.words, numbers
        )
        alike = lesson.clips.alike
        high_noise_share = 0.0 if lesson.is_whole else self.settings.high_noise_share
        t = self._times(len(x0) // alike, high_noise_share, generator).repeat_interleave(alike)
        eps = torch.randn(x0[::alike].shape, generator=generator).repeat_interleave(alike, dim=0)
        width, height = self.teacher.contract.sizes[0]
        with torch.no_grad():
            conditioning = self.teacher.text.conditioning(captions[share], width, height)
        if numbers is not None:
            backbone = cast("MotionUnet", denoiser.backbone)
            backbone = replace(backbone, numbers=numbers.to(device))
            denoiser = replace(denoiser, backbone=backbone)
        reading: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.probes is not None:
            reading = self.probes.read()
        with reading as scores:
            loss = noise_loss(
                denoiser,
                sent(x0[share], device),
                conditioning,
                t=t[share],
                eps=sent(eps[share], device),
                snr_limit=self.settings.snr_limit,
                snr_floor=self.settings.snr_floor,
            )
        if self.probes is not None:
            loss = loss + self.weight * self.probes.loss(scores, kinds[share], captions[share])
        return loss

    def _numbers(self, generator: torch.Generator) -> Int[Tensor, " chosen"] | None:
        """Return which frames are computed, rising; None for all."""
        num_frames = self.settings.frames
        if self.frames_seen is None or self.frames_seen >= num_frames:
            return None
        return torch.randperm(num_frames, generator=generator)[: self.frames_seen].sort().values

    def _times(
        self, count: int, high_noise_share: float, generator: torch.Generator
    ) -> Int[Tensor, " count"]:
        top = int(self.teacher.denoiser.schedule.top)  # the times of SDXL's schedule are integers
        anywhere = torch.randint(1, top + 1, (count,), generator=generator)
        if high_noise_share == 0:
            return anywhere
        high = torch.randint(top - top // 5 + 1, top + 1, (count,), generator=generator)
        is_high = torch.rand(count, generator=generator) < high_noise_share
        return torch.where(is_high, high, anywhere)
