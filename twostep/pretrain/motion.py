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
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from twostep.diffusion.shapes import sent
from twostep.evaluate.motions import find_motion
from twostep.formats.lora_files import merge_lora
from twostep.formats.motion_files import MotionConfig
from twostep.models.bundle import Bundle
from twostep.models.motion import load_pictures, motion_contract, picture_unet, with_motion
from twostep.networks.denoiser import Denoiser
from twostep.networks.domain_adapter import DomainAdapter, Layers
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
    layers: Layers = Field(
        "captions",
        description="of the picture UNet that the adapter is on: those that read captions, or all "
        "linear layers and convolutions; then it learns what moving things look like, too, which "
        "are small, beside the middle, and turned",
    )
    weight: float = Field(
        0.1,
        gt=0,
        description="of the cross-entropy of linear probes, which tell the kind of motion from the "
        "features that the motion module reads, beside the predicted noise, on single frames",
    )
    learns_on_clips: bool = Field(
        True,
        description="whether the adapter goes on learning with the motion module; otherwise it is "
        "merged into the picture model by then, as AnimateDiff's is, which takes less time",
    )
    weight_on_clips: float = Field(
        0.03,
        ge=0,
        description="of the cross-entropy while the motion module learns with the adapter",
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


Shows = Literal["kinds", "clips", "frames"]


class TurnSettings(Settings):
    """What one of the iterations learns from that come round in turn."""

    shows: Shows = Field(
        description="`kinds`: what iterations show without turns; `clips`: all frames of clips of "
        "random kinds at times of any noise, from which frames learn to be alike; `frames`: single "
        "frames without the motion module, from which the domain adapter alone learns"
    )
    batch_size: int = Field(gt=0, description="examples per iteration")


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
    turns: tuple[TurnSettings, ...] = Field(
        (),
        description="what iterations after the lessons show, one after the other and again; always "
        "`kinds` with the loop's batch_size if not given",
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

    @model_validator(mode="after")
    def _check_turns(self) -> MotionSettings:
        """Refuse single frames where nothing learns from them."""
        if all(turn.shows != "frames" for turn in self.turns):
            return self
        if self.words is None:
            raise ValueError(
                "from single frames the domain adapter alone learns, and there is none: give "
                "`words`, or leave the turn that shows frames out"
            )
        if not self.words.learns_on_clips:
            raise ValueError(
                "from single frames the domain adapter alone learns, which it no longer does by "
                "then: set words.learns_on_clips, or leave the turn that shows frames out"
            )
        return self


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
        words = settings.words
        adapter = DomainAdapter.on(picture_unet(pictures[0]), words.rank, layers=words.layers)
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
    denoiser.checkpoint_gradients(settings.gradient_checkpointing)
    adapter = backbone.adapter
    words = settings.words
    trained: nn.Module = backbone.network
    loss = _ClipLoss(teacher, settings, _lessons(clips, settings), _turns(clips, settings))
    applied: AbstractContextManager[None] = nullcontext()
    if words is not None and adapter is not None:
        adapter.to(denoiser.device)
        still = MotionModule(backbone.network.shape).requires_grad_(False).to(denoiser.device)
        probes = KindProbes.on(still, clips.kinds, weight=words.weight)
        loss = replace(loss, still=still, on_frames=probes)
        frames = [_Turn(clips, words.loop.batch_size, "frames")]
        with _applied(adapter, backbone):
            train_network(
                adapter,
                replace(loss, lessons=(), turns=frames),
                words.loop,
                folder,
                name="words",
                on_iteration=on_iteration,
            )
        if words.learns_on_clips:
            applied = _applied(adapter, backbone)
            trained = nn.ModuleDict({"motion": backbone.network, "adapter": adapter})
            if words.weight_on_clips:
                probes = KindProbes.on(backbone.network, clips.kinds, weight=words.weight_on_clips)
                loss = replace(loss, on_clips=probes)
        else:
            for base in backbone.bases:
                merge_lora(adapter.changes(), {"unet": base})
    backbone.network.requires_grad_(True)
    with applied:
        train_network(
            trained,
            loss,
            settings.loop,
            folder,
            name="motion",
            on_iteration=on_iteration,
            on_checkpoint=on_checkpoint,
        )


@contextmanager
def _applied(adapter: DomainAdapter, backbone: MotionUnet) -> Iterator[None]:
    """Let all picture UNets compute with an adapter in the block."""
    with ExitStack() as stack:
        for base in backbone.bases:
            stack.enter_context(adapter.applied(base))
        yield


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
        weight: of the cross-entropy beside the predicted noise.
    """

    norms: tuple[nn.Module, ...]
    directions: tuple[Float[Tensor, "_ kinds"], ...]
    kinds: tuple[str, ...]
    weight: float = 1.0

    SCALE: ClassVar[float] = 2.0
    """Of the scores, which are logits."""

    @classmethod
    def on(cls, network: MotionModule, kinds: Sequence[str], *, weight: float = 1.0) -> KindProbes:
        """Return the probes of a motion module, with the same directions in every run."""
        norms = [each.norm for each in network.modules() if isinstance(each, TimeTransformer)]
        generator = torch.Generator().manual_seed(0)
        directions = []
        for norm in norms:
            width = len(norm.weight)
            rows = torch.randn(width, width, generator=generator)
            directions.append(torch.linalg.qr(rows)[0][:, : len(kinds)].to(norm.weight.device))
        return cls(tuple(norms), tuple(directions), tuple(kinds), weight)

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
class _Turn:
    """What an iteration learns from.

    Attributes:
        clips: what is drawn.
        batch_size: how many of them.
        shows: some frames of each, all, or one without the motion module.
    """

    clips: MovingDrawings
    batch_size: int
    shows: Shows = "kinds"


def _lessons(clips: MovingDrawings, settings: MotionSettings) -> list[_Turn]:
    """Return what each of the first iterations learns from."""
    turns: list[_Turn] = []
    for each in settings.lessons:
        fewer = replace(
            clips,
            drawings=clips.drawings.first(each.concepts, each.styles),
            kinds=each.kinds,
            backgrounds=each.backgrounds or clips.backgrounds,
        )
        turns.extend([_Turn(fewer, each.batch_size)] * each.iterations)
    return turns


def _turns(clips: MovingDrawings, settings: MotionSettings) -> list[_Turn]:
    """Return what the iterations after these learn from in turn."""
    mixed = replace(clips, together=False)
    turns = [
        _Turn(clips if each.shows == "kinds" else mixed, each.batch_size, each.shows)
        for each in settings.turns
    ]
    return turns or [_Turn(clips, settings.loop.batch_size)]


@dataclass(frozen=True, eq=False)
class _ClipLoss:
    """The loss of an iteration: `noise_loss` on clips, and that of probes with their weight.

    Attributes:
        teacher: predicts, and whatever of it is trained is the caller's choice.
        settings: the recipe.
        lessons: what the first iterations learn from.
        turns: what the others learn from.
        still: a motion module that changes nothing, for single frames.
        on_frames: the probes where it is in the motion module's place.
        on_clips: the probes of the motion module.
    """

    teacher: Bundle
    settings: MotionSettings
    lessons: Sequence[_Turn]
    turns: Sequence[_Turn]
    still: MotionModule | None = None
    on_frames: KindProbes | None = None
    on_clips: KindProbes | None = None

    def __call__(self, iteration: int, randomness: Randomness) -> Tensor:
        generator = randomness.tensors
        device = self.teacher.denoiser.device
        turn = self._turn_of(iteration)
        share = world().share(turn.batch_size)
        numbers = self._numbers(turn.shows, generator)
        x0, captions, kinds = turn.clips.draw_frames(
            turn.batch_size, generator, randomness.words, numbers
        )
        alike = turn.clips.alike
        high_noise_share = self.settings.high_noise_share if turn.shows == "kinds" else 0.0
        t = self._times(len(x0) // alike, high_noise_share, generator).repeat_interleave(alike)
        eps = torch.randn(x0[::alike].shape, generator=generator).repeat_interleave(alike, dim=0)
        width, height = self.teacher.contract.sizes[0]
        with torch.no_grad():
            conditioning = self.teacher.text.conditioning(captions[share], width, height)
        probes = self.on_frames if turn.shows == "frames" else self.on_clips
        reading: AbstractContextManager[list[Tensor]] = nullcontext([])
        if probes is not None:
            reading = probes.read()
        with reading as scores:
            loss = noise_loss(
                self._denoiser(turn.shows, numbers),
                sent(x0[share], device),
                conditioning,
                t=t[share],
                eps=sent(eps[share], device),
                snr_limit=self.settings.snr_limit,
                snr_floor=self.settings.snr_floor,
            )
        if probes is not None:
            loss = loss + probes.weight * probes.loss(scores, kinds[share], captions[share])
        return loss

    def _turn_of(self, iteration: int) -> _Turn:
        if iteration < len(self.lessons):
            return self.lessons[iteration]
        return self.turns[iteration % len(self.turns)]

    def _denoiser(self, shows: Shows, numbers: Int[Tensor, " chosen"] | None) -> Denoiser:
        """Return what predicts these frames of clips, or single frames without motion."""
        denoiser = self.teacher.denoiser
        backbone = cast("MotionUnet", denoiser.backbone)
        if numbers is not None:
            backbone = replace(backbone, numbers=numbers.to(denoiser.device))
        if shows == "frames":
            assert self.still is not None
            backbone = replace(backbone, network=self.still)
        return replace(denoiser, backbone=backbone)

    def _numbers(self, shows: Shows, generator: torch.Generator) -> Int[Tensor, " chosen"] | None:
        """Return which frames are computed, rising; None for all."""
        num_frames = self.settings.frames
        wanted = {"frames": 1, "clips": None, "kinds": self.settings.frames_seen}[shows]
        if wanted is None or wanted >= num_frames:
            return None
        return torch.randperm(num_frames, generator=generator)[:wanted].sort().values

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
