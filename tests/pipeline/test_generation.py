"""What `generate` promises: each image its own seed, the contract obeyed, time and warnings
reported.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from twostep.contract import ContractError
from twostep.diffusion import GridError, initial_noise
from twostep.models.bundle import Bundle
from twostep.pipeline.generation import MAX_BATCH, GenerationError, Progress, generate
from twostep.pipeline.request import Request

PROMPT = "a 3d red apple on a blue background"


def final_latents(bundle: Bundle, request: Request) -> dict[int, torch.Tensor]:
    """The clean latents by seed: what the last step of each batch foresees is where it lands."""
    latents: dict[int, torch.Tensor] = {}

    def keep(progress: Progress) -> None:
        latents.update(zip(progress.seeds, progress.prediction.x0, strict=True))

    generate(bundle, request, on_step=keep)
    return latents


def test_noise_is_drawn_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    expected = torch.randn((16, 8, 8), generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    assert torch.equal(initial_noise(5, (16, 8, 8)), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_depends_on_its_seed_and_not_on_its_batch(student: Bundle) -> None:
    together = final_latents(student, Request(PROMPT, num_images=MAX_BATCH + 2, seed=40))
    assert list(together) == list(range(40, 40 + MAX_BATCH + 2))
    for seed in (40, 47, 40 + MAX_BATCH + 1):
        alone = final_latents(student, Request(PROMPT, seed=seed))[seed]
        torch.testing.assert_close(together[seed], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[40], together[41], atol=0.1)


def test_result_says_what_was_made(teacher: Bundle) -> None:
    result = generate(teacher, Request(PROMPT, num_images=2, seed=3))
    assert [image.size for image in result.images] == [(64, 64), (64, 64)]
    assert result.seeds == [3, 4]
    assert list(result.seconds) == ["text", "encode", "denoise", "decode"]
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert result.seconds_per_image == pytest.approx(sum(result.seconds.values()) / 2)
    assert result.contract == teacher.contract
    contract = teacher.contract
    assert (result.request.steps, result.request.guidance) == (contract.steps, contract.guidance)
    assert (result.request.width, result.request.height) == contract.sizes[0]


def test_progress_counts_every_step_of_every_batch(student: Bundle) -> None:
    steps: list[tuple[int, int]] = []
    generate(
        student,
        Request(PROMPT, num_images=MAX_BATCH + 1),
        on_step=lambda p: steps.append((p.num_done, p.num_steps)),
    )
    assert steps == [(done, 8) for done in range(1, 9)]


def test_a_raising_callback_ends_the_drawing(student: Bundle) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(student, Request(PROMPT), on_step=stop)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_same_request_draws_the_same_pixels(student: Bundle) -> None:
    first, second = (generate(student, Request(PROMPT, seed=5)) for _ in range(2))
    assert first.images[0].tobytes() == second.images[0].tobytes()


def test_teacher_guidance_is_the_paper_s_formula(teacher: Bundle) -> None:
    request = Request(PROMPT, steps=1, seed=2, negative_prompt="flat")
    plain = final_latents(teacher, replace(request, guidance=1.0, negative_prompt=""))[2]
    against = final_latents(
        teacher, replace(request, prompt="flat", guidance=1.0, negative_prompt="")
    )[2]
    guided = final_latents(teacher, replace(request, guidance=4.0))[2]
    torch.testing.assert_close(guided, against + 4 * (plain - against), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_up_to_one_is_none(teacher: Bundle, guidance: float) -> None:
    result = generate(teacher, Request(PROMPT, steps=2, guidance=guidance))
    assert result.request.guidance == 1
    assert any("switches guidance off" in warning for warning in result.warnings)


def test_guidance_asked_of_a_student_has_no_effect_and_says_why(student: Bundle) -> None:
    plain = generate(student, Request(PROMPT))
    result = generate(student, Request(PROMPT, guidance=5.0, negative_prompt="flat"))
    assert plain.warnings == []
    assert result.images[0].tobytes() == plain.images[0].tobytes()
    assert any("no effect" in warning and "distilled" in warning for warning in result.warnings)
    assert any("negative prompt has no effect" in warning for warning in result.warnings)


def test_words_outside_the_vocabulary_are_named(student: Bundle) -> None:
    warnings = generate(student, Request("a zyzzyva, qwghlm")).warnings
    assert len(warnings) == 1
    assert "zyzzyva, qwghlm" in warnings[0]


@pytest.mark.parametrize(
    ("prompt", "warns"),
    [
        ("a red apple AND a dog", True),
        ("A RED APPLE AND A DOG", False),
        ("a red apple and a dog", False),
        ("a red apple AND", False),
    ],
)
def test_a_sum_of_prompts_as_a1111_writes_it_is_warned_of(
    student: Bundle, prompt: str, warns: bool
) -> None:
    warnings = generate(student, Request(prompt)).warnings
    assert any("AND is read as the word" in warning for warning in warnings) == warns


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt_draws_anything_and_says_so(student: Bundle, prompt: str) -> None:
    result = generate(student, Request(prompt))
    assert len(result.images) == 1
    assert result.warnings == ["the prompt is empty: the model may draw anything it knows."]


def test_very_large_seed_draws_and_warns(student: Bundle) -> None:
    result = generate(student, Request(PROMPT, seed=2**32 + 7))
    assert result.warnings == [
        f"seed {2**32 + 7} draws the same noise as seed 7: "
        "torch's generator tells only 2**32 seeds apart."
    ]
    assert (
        result.images[0].tobytes() == generate(student, Request(PROMPT, seed=7)).images[0].tobytes()
    )


def test_student_refuses_other_step_counts(student: Bundle) -> None:
    with pytest.raises(ContractError, match="exactly 4 steps; asked for 3"):
        generate(student, Request(PROMPT, steps=3))


def test_size_outside_the_contract_is_refused(student: Bundle) -> None:
    with pytest.raises(ContractError, match="64x64"):
        generate(student, Request(PROMPT, width=128))


def test_more_steps_than_times_are_refused(teacher: Bundle) -> None:
    with pytest.raises((ContractError, GridError)):
        generate(teacher, Request(PROMPT, steps=1001))


def test_nan_in_the_network_is_an_error_and_no_black_picture(student: Bundle) -> None:
    broken = replace(student, denoiser=copy.deepcopy(student.denoiser))
    with torch.no_grad():
        next(broken.denoiser.network.conv_out.parameters()).fill_(float("nan"))
    with pytest.raises(GenerationError, match="latents of seed\\(s\\) 3, 4 hold NaN"):
        generate(broken, Request(PROMPT, seed=3, num_images=2))


def test_one_step_student_lands_on_its_own_prediction(
    teacher: Bundle, as_student: Callable[[Bundle, int], Bundle]
) -> None:
    one_step = as_student(teacher, 1)
    steps: list[Progress] = []
    generate(one_step, Request(PROMPT, seed=6), on_step=steps.append)
    shape = one_step.latent_shape(64, 64)
    conditioning = one_step.conditioning([PROMPT], 64, 64)
    with torch.inference_mode():
        expected = one_step.denoiser(
            initial_noise(6, shape)[None], torch.tensor([1000]), conditioning
        ).x0
    torch.testing.assert_close(steps[-1].prediction.x0, expected)


def test_a_prompt_over_the_limit_is_heard_to_its_end(student: Bundle) -> None:
    long = "a red apple on a blue background " * 4
    result, other = generate(student, Request(long)), generate(student, Request(long + "a dog"))
    assert not result.warnings
    assert result.images[0].tobytes() != other.images[0].tobytes()
