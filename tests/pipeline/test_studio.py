"""A studio draws requests together as it draws them one by one, and keeps the models last used."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import twostep
from twostep.contract import ContractError
from twostep.errors import TwostepError
from twostep.formats.locate import ModelError
from twostep.pipeline.generation import Progress
from twostep.pipeline.request import Control, Picture, Request, RequestError, Result
from twostep.pipeline.studio import Studio

APPLE = "a 3d red apple on a blue background"
DOG = "a dog on a white background"


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("cpu", max_models=3)


@pytest.fixture(scope="module")
def disc() -> Picture:
    image = Image.new("RGB", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 24, 36, 56), fill="white")
    return Picture.of(image)


@pytest.fixture(scope="module")
def half() -> Picture:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    return Picture.of(mask)


def pixels(answer: Result | TwostepError) -> list[bytes]:
    assert isinstance(answer, Result), answer
    return [image.tobytes() for image in answer.images]


def network_batches(studio: Studio, request: Request, work: Callable[[], object]) -> list[int]:
    """Return the number of rows of every call of the network that some work makes."""
    rows: list[int] = []
    network = studio.load(request).denoiser.network
    hook = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        work()
    finally:
        hook.remove()
    return rows


def test_requests_share_a_batch_and_get_the_same_pixels(studio: Studio) -> None:
    requests = [
        Request(APPLE, seed=1),
        Request(DOG, seed=2, num_images=3),
        Request("a (red)1.4 apple on a blue++ background", seed=3),
        Request("a green car", seed=4),
    ]
    alone = [pixels(studio.draw(request)) for request in requests]
    answers: list[Result | TwostepError] = []
    rows = network_batches(studio, requests[0], lambda: answers.extend(studio.submit(requests)))
    assert rows == [6, 6]
    assert [pixels(answer) for answer in answers] == alone
    assert len({image for request in alone for image in request}) == 6


def test_the_same_holds_for_a_guided_teacher_from_pictures(
    studio: Studio, disc: Picture, half: Picture
) -> None:
    """Guidance, an image to change, a mask and a ControlNet; at a low strength to be quick."""
    requests = [
        Request(
            prompt,
            seed=seed,
            num_images=num_images,
            steps=32,
            guidance=3.0,
            negative_prompt=negative,
            image=image,
            mask=half,
            strength=0.1,
            controls=(Control(shape, scale=0.8),),
        )
        for prompt, seed, num_images, negative, image, shape in (
            (APPLE, 5, 1, "flat", disc, half),
            (DOG, 6, 2, "", half, disc),
            (DOG, 5, 1, "", half, disc),
        )
    ]
    alone = [pixels(studio.draw(request)) for request in requests]
    answers: list[Result | TwostepError] = []
    rows = network_batches(studio, requests[0], lambda: answers.extend(studio.submit(requests)))
    assert rows == [8, 8, 8]
    assert [pixels(answer) for answer in answers] == alone


def test_requests_with_different_models_and_loras_are_drawn_in_one_submission(
    studio: Studio,
) -> None:
    requests = [
        Request(APPLE, loras=("nano_2step_lora",)),
        Request(APPLE, steps=2),
        Request(DOG, loras=("nano_2step_lora:0.9",)),
        Request(APPLE, seed=1, loras=("nano_2step_lora",)),
        Request(DOG, steps=1),
    ]
    alone = [pixels(studio.draw(request)) for request in requests]
    answers = studio.submit(requests)
    assert [pixels(answer) for answer in answers] == alone
    names = [answer.contract.name for answer in answers if isinstance(answer, Result)]
    assert names == ["nano-2step", "nano-2step", "nano-2step:0.9", "nano-2step", "nano-1step"]
    assert len({image for request in alone for image in request}) == 5


def test_more_images_than_a_batch_are_cut_as_they_are_alone(studio: Studio) -> None:
    requests = [Request(APPLE, seed=10, num_images=17, steps=1), Request(DOG, steps=1)]
    alone = [pixels(studio.draw(request)) for request in requests]
    assert [pixels(answer) for answer in studio.submit(requests)] == alone


def test_a_request_that_fails_leaves_the_others_alone(studio: Studio) -> None:
    requests = [
        Request(APPLE, seed=7),
        Request(APPLE, width=128),
        Request(APPLE, steps=3),
        Request(APPLE, model="nowhere"),
        Request(APPLE, loras=("nano_4step_lora", "nano_2step_lora")),
        Request(APPLE, engine="steam"),
        Request(DOG, seed=8),
    ]
    answers = studio.submit(requests)
    expected = [Result, ContractError, ModelError, ModelError, ContractError, TwostepError, Result]
    for answer, kind in zip(answers, expected, strict=True):
        assert isinstance(answer, kind), answer
    assert "there are 32, 8, 4, 2, 1" in str(answers[2])
    assert pixels(answers[0]) == pixels(studio.draw(requests[0]))
    assert pixels(answers[6]) == pixels(studio.draw(requests[6]))
    for request, answer in zip(requests, answers, strict=True):
        if isinstance(answer, TwostepError):
            with pytest.raises(type(answer)) as raised:
                studio.draw(request)
            assert str(raised.value) == str(answer)


def test_nothing_to_draw_is_nothing_drawn(studio: Studio) -> None:
    assert studio.submit([]) == []


def test_progress_comes_for_every_request(studio: Studio) -> None:
    seen: dict[int, list[tuple[int, int, list[int]]]] = {}

    def on_step(place: int, progress: Progress) -> None:
        assert len(progress.prediction.x0) == len(progress.seeds)
        step = (progress.num_done, progress.num_steps, progress.seeds)
        seen.setdefault(place, []).append(step)

    requests = [Request(APPLE, seed=3), Request(DOG, steps=1), Request(DOG, num_images=2)]
    studio.submit(requests, on_step=on_step)
    assert seen == {
        0: [(1, 2, [3]), (2, 2, [3])],
        1: [(1, 1, [0])],
        2: [(1, 2, [0, 1]), (2, 2, [0, 1])],
    }


def test_what_a_callback_raises_ends_the_submission(studio: Studio) -> None:
    def stop(place: int, progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.submit([Request(APPLE), Request(DOG)], on_step=stop)


def test_the_student_of_two_steps_draws_where_nothing_is_said(studio: Studio) -> None:
    assert studio.load(Request(APPLE)).contract.steps == 2
    assert studio.load(Request(APPLE, loras=("nano_4step_lora",))).contract.steps == 4
    openmoji = str(Path(__file__).parents[2] / "examples" / "openmoji")
    assert studio.load(Request(APPLE, model=openmoji)).contract.role == "teacher"
    with pytest.raises(ModelError, match="draws in 4 steps, not in 2"):
        studio.load(Request(APPLE, steps=2, loras=("nano_4step_lora",)))


def test_the_result_names_the_model_and_its_loras(studio: Studio) -> None:
    wish = Request(APPLE, loras=("nano_2step_lora:0.9",))
    result = studio.draw(wish)
    assert (result.request.model, result.request.loras) == ("nano", wish.loras)
    assert result.origin == ("nano", "nano_2step_lora:0.9")
    assert pixels(studio.draw(result.request)) == pixels(result)


def test_device_and_precision_are_the_studio_s() -> None:
    assert Studio("cpu").dtype == torch.float32
    half = Studio("cpu", torch.bfloat16)
    network = half.load(Request(APPLE, steps=1)).denoiser.network
    assert network.conv_in.weight.dtype == torch.bfloat16
    with pytest.raises(RequestError, match="expected at least 1"):
        Studio(max_models=0)


def test_the_model_that_was_used_longest_ago_leaves() -> None:
    studio = Studio("cpu", max_models=2)

    def network(steps: int) -> object:
        return studio.load(Request(APPLE, steps=steps)).denoiser.network

    one, two = network(1), network(2)
    assert network(1) is one
    network(4)  # 2 leaves
    assert network(1) is one
    assert network(2) is not two  # 4 leaves
    assert network(1) is one


@pytest.mark.slow
def test_models_leave_until_their_weights_fit_into_memory() -> None:
    bundle = twostep.load("nano", steps=1)
    networks = [bundle.denoiser.network, *bundle.text.networks.values(), bundle.codec.vae]
    num_bytes = 4 * sum(value.numel() for net in networks for value in net.state_dict().values())
    studio = Studio("cpu", max_models=9, max_bytes=int(2.5 * num_bytes))
    for steps in (1, 2, 1, 4):
        studio.load(Request(APPLE, steps=steps))
    assert studio.loaded == [("nano", 1), ("nano", 4)]
    small = Studio("cpu", max_bytes=num_bytes - 1)
    with pytest.raises(ModelError, match="Allow more memory"):
        small.load(Request(APPLE, steps=1))
    assert not small.loaded
    half = Studio("cpu", torch.bfloat16, max_bytes=num_bytes - 1)
    half.load(Request(APPLE, steps=1))
    assert half.loaded == [("nano", 1)]


def test_a_model_that_cannot_be_loaded_takes_no_place() -> None:
    studio = Studio("cpu", max_models=1)
    network = studio.load(Request(APPLE, steps=1)).denoiser.network
    with pytest.raises(ModelError):
        studio.load(Request(APPLE, model="nowhere"))
    assert studio.load(Request(APPLE, steps=1)).denoiser.network is network


@pytest.mark.slow
def test_threads_share_a_studio() -> None:
    studio = Studio("cpu", max_models=2)
    requests = [
        Request(APPLE, seed=1),
        Request(DOG, seed=2, steps=1),
        Request(APPLE, seed=3, loras=("nano_2step_lora",)),
    ] * 2
    alone = [pixels(Studio("cpu").draw(request)) for request in requests[:3]] * 2
    with ThreadPoolExecutor(4) as pool:
        networks = list(pool.map(lambda _: studio.load(requests[0]).denoiser.network, range(4)))
        drawn = list(pool.map(lambda request: pixels(studio.draw(request)), requests))
        submitted = list(pool.map(studio.submit, [requests[:3], requests[3:]]))
    assert all(network is networks[0] for network in networks)
    assert drawn == alone
    assert [pixels(answer) for answers in submitted for answer in answers] == alone


def test_it_is_public() -> None:
    assert twostep.Studio is Studio


def test_answers_are_told_one_by_one_as_they_come(studio: Studio) -> None:
    told: list[tuple[int, object]] = []
    requests = [Request(APPLE, steps=1), Request(DOG, steps=77), Request(DOG, steps=1)]
    answers = studio.submit(requests, on_answer=lambda place, answer: told.append((place, answer)))
    assert sorted(place for place, _ in told) == [0, 1, 2]
    assert all(answers[place] is answer for place, answer in told)

    def enough(place: int, answer: object) -> None:
        told.append((place, answer))
        raise InterruptedError

    told.clear()
    with pytest.raises(InterruptedError):
        studio.submit([requests[0], requests[2]], on_answer=enough)
    assert [place for place, _ in told] == [0]  # the second of the batch was not decoded any more
