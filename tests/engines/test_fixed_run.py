"""All steps as one network are the steps one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import students
from twostep.engines.calls import Call
from twostep.engines.captured import CapturedForward
from twostep.engines.fixed_run import Decoder, FixedRun, FixedRuns, HasGraphs
from twostep.engines.graphed import digest_of
from twostep.engines.graphs import Graph, GraphedForward
from twostep.media.codec import TinyDecoder
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.models.runtime import take_notes
from twostep.models.sampling import (
    Guided,
    draw_noise,
    encode_prompts,
    sample_latents,
    sampling_times,
)
from twostep.networks.conditioning import Conditioning
from twostep.pretrain.model import random_bundle


@pytest.fixture(scope="module")
def student() -> Bundle:
    return students.as_student(random_bundle(), 2)


@pytest.fixture(scope="module")
def guided(student: Bundle) -> Guided:
    with torch.no_grad():
        return encode_prompts(student, ["a red fox"], student.contract.sizes[0])


@pytest.fixture(scope="module")
def noise(student: Bundle) -> Tensor:
    return draw_noise([3], student.latent_shape(*student.contract.sizes[0]))


class InPytorch:
    """A graph that is no graph: it calls the network."""

    answer_spec: Any = None

    def __init__(self, network: nn.Module, call: Call) -> None:
        self._network = network
        self.answer_spec = torch.utils._pytree.tree_structure(network(*call.tensors))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return torch.utils._pytree.tree_leaves(self._network(*tensors))


def in_pytorch(network: nn.Module, call: Call) -> Graph:
    return InPytorch(network, call)


def runs(bundle: Bundle, build: Any = in_pytorch) -> FixedRuns:
    """Return what runs all steps, with PyTorch in an engine's place."""
    return FixedRuns(
        bundle.denoiser,
        bundle.codec,
        lambda network: GraphedForward(network, "test", build, "nobody does"),
    )


def test_a_fixed_run_is_the_steps_one_by_one(
    student: Bundle, guided: Guided, noise: Tensor
) -> None:
    times = sampling_times(student.contract, student.denoiser.schedule)
    with torch.no_grad():
        expected = sample_latents(
            student.denoiser,
            guided,
            noise,
            times=times,
            seeds=[3],
        )
        together = runs(student)(guided, noise, times, "euler")
    assert together is not None
    assert torch.equal(together.latents, expected)
    assert together.pictures is not None
    assert torch.equal(together.pictures, student.codec.decode(expected))


def test_what_a_graph_holds_is_in_what_tells_graphs_apart(student: Bundle) -> None:
    denoiser = student.denoiser
    codec = student.codec
    assert isinstance(codec, ImageCodec)
    ways = [
        FixedRun(denoiser, 2),
        FixedRun(denoiser, 1),
        FixedRun(replace(denoiser, prediction_type="v"), 2),
        FixedRun(denoiser, 2, codec),
        FixedRun(denoiser, 2, replace(codec, deviation=2.0)),
        Decoder(codec),
        Decoder(replace(codec, deviation=2.0)),
    ]
    assert len({digest_of(each) for each in ways}) == len(ways)
    assert digest_of(ways[0]) == digest_of(FixedRun(denoiser, 2))


def test_what_is_not_plain_is_run_step_by_step(
    student: Bundle, guided: Guided, noise: Tensor
) -> None:
    times = (1000, 500, 0)
    run = runs(student)
    known = replace(guided.positive, known=torch.zeros(1, 5, 8, 8))
    with torch.no_grad():
        assert run(guided, noise, times, "euler") is not None
        assert run(Guided(guided.positive, guided.positive, 3.0), noise, times, "euler") is None
        assert run(Guided(known), noise, times, "euler") is None
        assert run(guided, noise.expand(2, -1, -1, -1), times, "euler") is None
        assert run(guided, noise, times, "renoise") is None
        assert run(guided, noise, (1000, 800, 600, 400, 200, 0), "euler") is None


def test_a_run_that_cannot_be_made_is_told_and_its_steps_are_run(
    student: Bundle, guided: Guided, noise: Tensor
) -> None:
    def refuse(network: nn.Module, call: Call) -> Graph:
        raise RuntimeError("no such operation")

    take_notes()
    run = runs(student, refuse)
    assert run(guided, noise, (1000, 500, 0), "euler") is None
    (note,) = take_notes()
    assert "no such operation" in note
    assert note.endswith("so nobody does.")
    assert run(guided, noise, (1000, 500, 0), "euler") is None
    assert take_notes() == []


def test_the_run_takes_conditioning_of_its_own_shape(student: Bundle, noise: Tensor) -> None:
    width = student.contract.sizes[0][0]
    with torch.no_grad():
        first = encode_prompts(student, ["a red fox"], (width, width)).positive
    longer = Conditioning(torch.cat([first.text, first.text], dim=1), first.pooled, first.sizes)
    with torch.no_grad():
        run = runs(student)
        one = run(Guided(first), noise, (1000, 0), "euler")
        other = run(Guided(longer), noise, (1000, 0), "euler")
    assert one is not None
    assert other is not None
    assert not torch.equal(one.latents, other.latents)


class OneAnswer(nn.Module):
    """A layer that answers in the same memory every time, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.places: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        place = self.places.setdefault(len(x), torch.empty(len(x), 2))
        return {"y": place.copy_(self.layer(x))}


def test_a_capture_is_made_once_for_every_kind_of_call_and_keeps_answers_apart() -> None:
    network = OneAnswer()
    captures = []

    def capture(compute: Callable[[], object], device: torch.device) -> Callable[[], object]:
        captures.append(device)
        compute()
        return compute

    forward = CapturedForward(network, capture)
    with torch.no_grad():
        first = forward(torch.ones(1, 3))["y"]
        kept = first.clone()
        twos = torch.full((1, 3), 2.0)
        torch.testing.assert_close(forward(twos)["y"], network.layer(twos))
        assert torch.equal(first, kept)
        assert len(captures) == 1
        for count in range(2, 10):
            x = torch.randn(count, 3)
            torch.testing.assert_close(forward(x)["y"], network.layer(x))
        assert len(captures) == 9
        forward(torch.ones(9, 3))
        assert len(captures) == 9
        forward(torch.ones(1, 3))  # which was used longest ago
        assert len(captures) == 10


def test_a_captured_run_draws_what_the_steps_do(
    student: Bundle, guided: Guided, noise: Tensor
) -> None:
    def capture(compute: Callable[[], object], device: torch.device) -> Callable[[], object]:
        compute()
        return lambda: None  # what it captured was computed on these very values

    captured = FixedRuns(student.denoiser, student.codec, lambda run: CapturedForward(run, capture))
    with torch.no_grad():
        ours = captured(guided, noise, (1000, 500, 0), "euler")
        theirs = runs(student)(guided, noise, (1000, 500, 0), "euler")
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.latents, theirs.latents)
    assert ours.pictures is not None
    assert theirs.pictures is not None
    assert torch.equal(ours.pictures, theirs.pictures)


def test_a_run_decodes_by_the_tiny_decoder_where_that_decodes(
    student: Bundle, guided: Guided, noise: Tensor
) -> None:
    network = nn.Sequential(
        nn.ConvTranspose2d(4, 3, kernel_size=4, stride=4), nn.Hardtanh(-2.0, 2.0)
    )
    codec = student.codec
    assert isinstance(codec, ImageCodec)
    tiny = replace(codec, tiny=TinyDecoder(network, scaling_factor=0.5), decoder="tiny")
    with torch.no_grad():
        together = runs(replace(student, codec=tiny))(guided, noise, (1000, 500, 0), "euler")
    assert together is not None
    assert together.pictures is not None
    assert torch.equal(together.pictures, tiny.decode(together.latents))


def test_where_decoding_in_the_run_takes_too_much_memory_the_steps_alone_are_run(
    student: Bundle, guided: Guided, noise: Tensor
) -> None:
    class Short:
        """A graph for which there is no memory."""

        def graphed(self, *args: Any) -> Any:
            raise MemoryError

    made: list[bool] = []

    def forward(network: nn.Module) -> HasGraphs:
        assert isinstance(network, FixedRun)
        made.append(network.decoder is not None)
        return Short() if made[-1] else GraphedForward(network, "test", in_pytorch)

    run = FixedRuns(student.denoiser, student.codec, forward)
    with torch.no_grad():
        for _ in range(2):
            together = run(guided, noise, (1000, 500, 0), "euler")
            assert together is not None
            assert together.pictures is None
    assert made == [True, False]


def test_pieces_draw_what_the_whole_does(student: Bundle, guided: Guided, noise: Tensor) -> None:
    run = runs(student)
    with torch.no_grad():
        for times in ((1000, 0), (1000, 500, 0), (999, 700, 300, 0)):
            whole = run(guided, noise, times, "euler")
            pieces = run.in_pieces(guided.positive, noise, times)
            assert whole is not None
            assert pieces is not None
            assert torch.equal(pieces[0], whole.latents)
            assert torch.equal(pieces[1], whole.pictures)
