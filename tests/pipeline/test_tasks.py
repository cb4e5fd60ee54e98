"""Pictures that go in: strengths snap to trained times, masks hold, ControlNets fit, and bad input
is told.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from twostep.contract import ContractError
from twostep.formats.locate import ModelError
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.networks.adapters import add_lora, remove_loras
from twostep.pipeline.generation import Progress, generate
from twostep.pipeline.prepare import prepare
from twostep.pipeline.provenance import read_provenance, save_images
from twostep.pipeline.request import Control, Picture, Request, RequestError, Result

PROMPT = "a 3d red apple on a blue background"


def stripes(width: int = 64, height: int = 64) -> Image.Image:
    """A picture in which every column differs."""
    columns = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(columns[None, :, None], (height, width, 3)).copy())


def half_mask(width: int = 64, height: int = 64) -> Image.Image:
    """White on the right."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.fixture(scope="module")
def image() -> Picture:
    return Picture.of(stripes())


def walked(bundle: Bundle, request: Request) -> tuple[Result, int]:
    """The result, and how many steps were taken."""
    seen: list[Progress] = []
    result = generate(bundle, request, on_step=seen.append)
    assert [step.num_done for step in seen] == list(range(1, len(seen) + 1))
    assert {step.num_steps for step in seen} == {len(seen)}
    return result, len(seen)


SNAPS = [
    *[(1, wish, 1, became) for wish, became in ((0.1, 0.25), (0.3, 0.25), (0.6, 0.5), (1.0, 1.0))],
    *[(2, 0.25, 1, 0.25), (2, 0.5, 1, 0.5), (2, 0.8, 2, 0.75), (2, 1.0, 2, 1.0)],
    *[(4, 0.5, 2, 0.5), (4, 0.625, 3, 0.75), (4, 0.01, 1, 0.25)],
    *[(8, 0.63, 5, 0.625), (8, 0.125, 1, 0.125)],
]


@pytest.mark.parametrize(("steps", "wish", "taken", "became"), SNAPS)
def test_strength_snaps_to_the_student_s_own_times(
    image: Picture, steps: int, wish: float, taken: int, became: float
) -> None:
    student = load_bundle("nano", steps=steps)
    result, count = walked(student, Request(PROMPT, image=image, strength=wish))
    assert (count, result.request.strength, result.request.steps) == (taken, became, steps)
    said = [
        warning
        for warning in result.warnings
        if warning.startswith(f"strength {wish:g} became {became:g}")
    ]
    assert len(said) == (wish != became)


def test_a_teacher_begins_at_the_nearest_time_of_its_grid(teacher: Bundle, image: Picture) -> None:
    result, count = walked(teacher, Request(PROMPT, image=image, strength=0.6, steps=8))
    assert (count, result.request.strength, result.warnings) == (5, 0.625, result.warnings)
    assert not any("strength" in warning for warning in result.warnings)


def test_strength_has_its_usual_values(student: Bundle, image: Picture) -> None:
    assert generate(student, Request(PROMPT, image=image)).request.strength == 0.75
    masked = generate(student, Request(PROMPT, image=image, mask=Picture.of(half_mask())))
    assert masked.request.strength == 1.0
    assert generate(student, Request(PROMPT)).request.strength is None


def test_low_strength_stays_near_the_image_and_full_strength_forgets_it(image: Picture) -> None:
    student = load_bundle("nano", steps=4)

    def far(strength: float) -> float:
        drawn = generate(student, Request(PROMPT, image=image, strength=strength)).images[0]
        return float(np.abs(np.asarray(drawn, float) - np.asarray(image.image, float)).mean())

    assert far(0.25) < far(0.5) < far(1.0)
    full = generate(student, Request(PROMPT, image=image, strength=1.0)).images[0]
    assert full.tobytes() == generate(student, Request(PROMPT)).images[0].tobytes()


def test_each_edited_image_depends_on_its_seed_alone(student: Bundle, image: Picture) -> None:
    asked = Request(PROMPT, image=image, strength=0.5, seed=3, num_images=3)
    together = generate(student, asked).images
    alone = generate(student, asked.only(5)).images[0]
    assert np.abs(np.asarray(together[2], int) - np.asarray(alone, int)).max() <= 1
    assert together[0].tobytes() != together[1].tobytes()


def test_nothing_changes_outside_of_the_mask(student: Bundle, image: Picture) -> None:
    for strength in (0.5, 1.0):
        asked = Request(PROMPT, image=image, mask=Picture.of(half_mask()), strength=strength)
        drawn, given = np.asarray(generate(student, asked).images[0]), np.asarray(image.image)
        assert (drawn[:, :32] == given[:, :32]).all()
        assert (drawn[:, 32:] != given[:, 32:]).mean() > 0.5


@pytest.mark.parametrize("top", [20, 21, 22, 23])
@pytest.mark.parametrize("scale", [1, 4])
def test_a_thin_mask_is_drawn_wherever_it_lies_in_its_latents(
    student: Bundle, image: Picture, top: int, scale: int
) -> None:
    """One row of pixels, in any row of a latent, in a picture of the drawn size or larger."""
    large = image.image.resize((64 * scale, 64 * scale), Image.Resampling.NEAREST)
    mask = Image.new("L", large.size)
    mask.paste(255, (0, top * scale, large.width, top * scale + 1))
    asked = Request(PROMPT, image=Picture.of(large), mask=Picture.of(mask))
    prepared = prepare(student, asked)
    assert prepared.mask is not None and prepared.mask[0, 0].nonzero()[:, 0].unique() == top
    # Latents that are put back are the image's own at time 0; those that are drawn stay as given.
    shape = (1, *student.latent_shape(64, 64))
    put_back = prepared.put_back(
        torch.full(shape, 77.0), torch.zeros(1), torch.zeros(shape), student.denoiser.schedule
    )
    assert (put_back[0] == 77).all(dim=0).nonzero()[:, 0].unique().tolist() == [top // 4]


def layer(colour: str, box: tuple[int, int, int, int], ground: str = "#00000000") -> Image.Image:
    """A box of one colour on another, which is a transparent layer by default."""
    painted = Image.new("RGBA", (64, 64), ground)
    painted.paste(colour, box)
    return painted


def deep_box() -> np.ndarray:
    """The same box in 16 bits, on a grey that is darker than half."""
    values = np.full((64, 64), 32000, np.uint16)
    values[:, 16:32] = 34000
    return values


BOX = (16, 0, 32, 64)
INSIDE = list(range(16, 32))
OUTSIDE = [*range(16), *range(32, 64)]


@pytest.mark.parametrize(
    ("mask", "columns", "is_mentioned"),
    [
        (layer("white", BOX), INSIDE, True),
        (layer("white", BOX, "#ffffff00"), INSIDE, True),
        (layer("#ffffffa0", BOX), INSIDE, True),
        (layer("white", BOX, "black"), INSIDE, False),
        (layer("black", BOX), OUTSIDE, False),
        (layer("#40608000", BOX, "#406080"), INSIDE, False),  # a picture with a hole in it
        (Image.fromarray(deep_box()), INSIDE, False),
    ],
)
def test_a_mask_may_be_white_on_black_a_hole_or_white_on_nothing(
    student: Bundle, image: Picture, mask: Image.Image, columns: list[int], is_mentioned: bool
) -> None:
    prepared = prepare(student, Request(PROMPT, image=image, mask=Picture.of(mask)))
    assert prepared.mask is not None
    assert prepared.mask[0, 0].all(dim=0).nonzero()[:, 0].tolist() == columns
    assert any("on a transparent layer" in warning for warning in prepared.warnings) is is_mentioned


def test_what_is_odd_about_a_picture_is_said_when_it_is_drawn_with(student: Bundle) -> None:
    """Its name, its mask's and its control's are in the warnings."""
    dark = Picture.of(Image.fromarray(np.full((64, 64), 900, np.uint16)))
    prepared = prepare(student, Request(PROMPT, image=dark))
    assert "the image: its brightest value is 900 of 65,535" in " ".join(prepared.warnings)


def test_what_is_kept_steers_what_is_drawn(student: Bundle, image: Picture) -> None:
    """The known half is noised and put back at each step, so another image there changes the drawn
    half too.
    """
    other = Picture.of(Image.new("RGB", (64, 64), "red"))
    drawn = [
        np.asarray(
            generate(student, Request(PROMPT, image=picture, mask=Picture.of(half_mask()))).images[
                0
            ]
        )[:, 32:]
        for picture in (image, other)
    ]
    assert (drawn[0] != drawn[1]).any()


def test_an_image_of_another_size_is_cut_as_training_does_it(student: Bundle) -> None:
    wide, cut = Picture.of(stripes(192, 64)), Picture.of(stripes(192, 64).crop((64, 0, 128, 64)))
    drawn = [
        generate(student, Request(PROMPT, image=picture, strength=0.25)).images[0]
        for picture in (wide, cut)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()


def several(bundle: Bundle) -> Bundle:
    return replace(bundle, contract=replace(bundle.contract, sizes=((64, 64), (96, 32), (32, 96))))


def test_an_image_chooses_the_size_that_fits_it_best(student: Bundle) -> None:
    for size in ((300, 100), (100, 280), (70, 60)):
        result = generate(
            several(student), Request(PROMPT, image=Picture.of(stripes(*size)), strength=0.25)
        )
        expected = {300: (96, 32), 100: (32, 96), 70: (64, 64)}[size[0]]
        assert result.images[0].size == expected == (result.request.width, result.request.height)
    asked = Request(PROMPT, image=Picture.of(stripes(300, 100)), width=64, height=64)
    assert generate(several(student), asked).images[0].size == (64, 64)


def test_sizes_other_than_square_are_drawn_and_those_between_warn(student: Bundle) -> None:
    assert generate(several(student), Request(PROMPT, width=96, num_images=2)).images[1].size == (
        96,
        32,
    )
    result = generate(several(student), Request(PROMPT, width=32, height=64))
    assert result.images[0].size == (32, 64)
    assert any("32x64 is none of these" in warning for warning in result.warnings)
    for width, height in ((33, 64), (64, 63), (8, 8), (10_000, 10_000), (96, 96)):
        with pytest.raises(ContractError, match=f"multiples of 32; asked for {width}x{height}"):
            generate(several(student), Request(PROMPT, width=width, height=height))


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    for picture in (Picture.of(clear), Picture.of(tmp_path / "clear.png")):
        assert picture.image.mode == "RGB" and picture.image.getpixel((3, 3)) == (255, 255, 255)


def test_pictures_that_are_none_too_small_or_too_large_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:60])
    for name, lesson in (
        ("text.png", "cannot be read"),
        ("half.png", "cannot be read"),
        ("none.png", "No such file"),
    ):
        with pytest.raises(RequestError, match=f"{name} cannot be taken: .*{lesson}"):
            Picture.of(tmp_path / name)
    with pytest.raises(RequestError, match="it is 1x1; expected 8x8 to 67,108,864"):
        Picture.of(Image.new("RGB", (1, 1)))
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(RequestError, match="it is 10000x10000"):
        Picture.of(tmp_path / "huge.png")


WRONG = [
    ({"strength": 0.5}, "give the image too"),
    ({"mask": "mask"}, "give the image too"),
    ({"image": "image", "strength": 0.0}, "above 0, up to 1"),
    ({"image": "image", "strength": 1.5}, "above 0, up to 1"),
    ({"image": "image", "strength": float("nan")}, "above 0, up to 1"),
    ({"image": "image", "mask": "narrow"}, "the mask is 32x64 and the image 64x64.*the same size"),
]


@pytest.mark.parametrize(("values", "lesson"), WRONG)
def test_impossible_wishes_are_told(image: Picture, values: dict[str, object], lesson: str) -> None:
    pictures = {
        "image": image,
        "mask": Picture.of(half_mask()),
        "narrow": Picture.of(half_mask(32, 64)),
    }
    with pytest.raises(RequestError, match=lesson):
        Request(PROMPT, **{key: pictures.get(value, value) for key, value in values.items()})


def test_a_black_mask_is_told(student: Bundle, image: Picture) -> None:
    with pytest.raises(RequestError, match="black everywhere"):
        generate(student, Request(PROMPT, image=image, mask=Picture.of(Image.new("L", (64, 64)))))


@pytest.mark.parametrize(
    "values", [(-1.0, 0.0, 1.0), (float("nan"), 0.0, 1.0), (1.0, 0.5, 0.5), (1.0, 0.0, 1.1)]
)
def test_impossible_controls_are_told(image: Picture, values: tuple[float, float, float]) -> None:
    with pytest.raises(RequestError, match="rising shares"):
        Control(image, "silhouette", *values)


def test_where_a_drawing_begins_is_chosen(student: Bundle) -> None:
    pure, scaled = (
        generate(student, Request(PROMPT, init_noise=mode)).images[0]
        for mode in ("comfyui", "diffusers")
    )
    assert (
        pure.tobytes() == generate(student, Request(PROMPT)).images[0].tobytes() != scaled.tobytes()
    )
    assert "init_noise" in Request(PROMPT, init_noise="diffusers").to_json()


@pytest.fixture(scope="module")
def make_control(teacher: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write a ControlNet of a UNet with random weights and return its folder."""

    def make(channels: tuple[int, ...] = (16, 32, 64), **changes: object) -> str:
        torch.manual_seed(1)
        config = {**teacher.denoiser.network.config, **changes}
        unet = type(teacher.denoiser.network).from_config(config)
        network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
        for block in (*network.controlnet_down_blocks, network.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(block.weight, std=0.1)
        folder = tmp_path_factory.mktemp("control")
        network.save_pretrained(folder)
        return str(folder)

    return make


def test_a_control_acts_by_its_scale_and_in_its_share_of_the_steps(
    student: Bundle, image: Picture, make_control: Callable[..., str]
) -> None:
    folder = make_control()

    def foreseen(*controls: Control) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        generate(
            student,
            Request(PROMPT, controls=controls),
            on_step=lambda step: seen.append(step.prediction.x0),
        )
        return seen

    plain, late = foreseen(), foreseen(Control(image, folder, 1.0, 0.5, 1.0))
    assert [torch.equal(a, b) for a, b in zip(plain, late, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert all(map(torch.equal, plain, foreseen(Control(image, folder, 0.0))))
    early = foreseen(Control(image, folder, 1.0, 0.0, 0.25))
    assert not torch.equal(early[0], plain[0])


MISFITS = [
    ({"channels": (16, 32, 64, 96)}, "pixels_per_latent 8, expected 4"),
    ({"cross_attention_dim": 96}, "cross_attention_dim 96, expected 160"),
    (
        {"block_out_channels": (48, 96, 96)},
        r"block_out_channels \[48, 96, 96\], expected \[48, 96, 160\]",
    ),
]


@pytest.mark.parametrize(("made", "lesson"), MISFITS)
def test_a_control_for_another_model_says_what_differs(
    student: Bundle,
    image: Picture,
    make_control: Callable[..., str],
    made: dict[str, object],
    lesson: str,
) -> None:
    if "block_out_channels" in made:
        made = {**made, "attention_head_dim": (2, 3, 3)}
    folder = make_control(**made)
    with pytest.raises(ModelError, match=f"for another model: .*{lesson}"):
        generate(student, Request(PROMPT, controls=(Control(image, folder),)))


def test_what_is_no_controlnet_is_told(student: Bundle, image: Picture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "ControlNetUnionModel"}')
    for name, lesson in (
        (str(tmp_path), "is ControlNetUnionModel"),
        ("silhouete", "no folder.*silhouette"),
    ):
        with pytest.raises(ModelError, match=lesson):
            generate(student, Request(PROMPT, controls=(Control(image, name),)))


def digests(images: list[Image.Image]) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


@pytest.mark.slow
@pytest.mark.parametrize("with_lora", [False, True])
def test_four_threads_draw_what_one_does(
    student: Bundle, image: Picture, make_control: Callable[..., str], with_lora: bool
) -> None:
    """Weighted and long prompts, edits, ControlNets, all at once on one bundle; also where a LoRA
    is on every other.
    """
    bundles = [student, student]
    if with_lora:
        network = student.denoiser.network
        lora = add_lora(network, "style", rank=2)
        for parameter in lora.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        bundles[1] = replace(student, denoiser=replace(student.denoiser, lora="style"))
    control = Control(image, make_control())
    requests = [
        Request(PROMPT, seed=1, num_images=2),
        Request("a (red)1.4 apple on a blue++ background", seed=2),
        Request(f"{PROMPT}, " * 5, seed=3),
        Request(PROMPT, seed=4, image=image, strength=0.5),
        Request(PROMPT, seed=5, image=image, mask=Picture.of(half_mask())),
        Request(PROMPT, seed=6, controls=(control,)),
    ] * 3
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        asked = list(zip(bundles * 9, requests, strict=True))
        alone = [digests(generate(*each).images) for each in asked]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda each: digests(generate(*each).images), asked))
    finally:
        torch.set_num_threads(threads)
        remove_loras(student.denoiser.network)
    assert together == alone
    assert len({digest for request in alone[:6] for digest in request}) == 7


def test_requests_with_pictures_survive_json_and_are_found_again(
    tmp_path: Path, image: Picture
) -> None:
    stripes().save(tmp_path / "in.png")
    half_mask().save(tmp_path / "mask.png")
    asked = Request(
        PROMPT,
        image=Picture.of(tmp_path / "in.png"),
        mask=Picture.of(tmp_path / "mask.png"),
        controls=(Control(Picture.of(tmp_path / "in.png"), "silhouette", 0.8, 0.0, 0.5),),
    )
    read = Request.from_json(asked.to_json())
    assert read == asked and str(tmp_path) not in asked.to_json()
    assert read.image is not None and read.image.pixels is None
    with pytest.raises(RequestError, match="known by name alone"):
        _ = read.image.image
    found = read.reopen([tmp_path / "nowhere", tmp_path])
    assert found.image is not None and found.image.image.tobytes() == stripes().tobytes()
    stripes(32, 64).save(tmp_path / "in.png")
    with pytest.raises(RequestError, match=r"in\.png is not the file that went in, by its SHA-256"):
        read.reopen([tmp_path])
    with pytest.raises(RequestError, match="a picture without a file is not there"):
        Request(PROMPT, image=image).reopen([tmp_path])


@pytest.mark.parametrize(
    "part", ['"image": {"name": 1}', '"controls": [{"picture": 3}]', '"image": "x.png"']
)
def test_damaged_pictures_in_json_are_refused(part: str) -> None:
    with pytest.raises(RequestError):
        Request.from_json(f'{{"prompt": "a", {part}}}')


def test_a_png_says_what_was_loaded_and_what_was_drawn_with_it(
    student: Bundle, tmp_path: Path
) -> None:
    bundle = replace(student, origin=("models/a", "b:0.8"))
    path = save_images(generate(bundle, Request(PROMPT, num_images=18, seed=5)), tmp_path)[17]
    told = read_provenance(path)
    assert told.origin == ("models/a", "b:0.8")
    assert (told.batch.seed, told.batch.num_images, told.request.seed) == (21, 2, 22)


def test_previews_show_what_is_foreseen(image: Picture) -> None:
    student, seen = load_bundle("nano", steps=2), list[Image.Image]()
    result = generate(
        student, Request(PROMPT, seed=7), on_step=lambda step: seen.extend(step.previews())
    )
    assert [preview.size for preview in seen] == [(64, 64)] * 2
    whole = np.asarray(result.images[0], float)
    apart = np.abs(np.asarray(seen[-1], float) - whole).mean()
    assert apart < 20 < np.abs(whole - whole.mean(axis=(0, 1))).mean()


def test_a_student_that_visits_other_times_begins_an_image_at_one_that_it_knows(
    student: Bundle, image: Picture
) -> None:
    contract = replace(
        student.contract,
        sampler="renoise",
        trained_times=tuple(range(1000, 0, -20)),
        sampling_times=(1000, 760, 500, 260),
    )
    other = replace(student, contract=contract)
    result, steps = walked(other, Request(PROMPT, image=image, strength=0.75))
    assert (result.request.strength, steps) == (0.76, 4 - 1)


def test_a_student_that_takes_noise_for_a_later_time_begins_with_no_image(
    as_student: Callable[[Bundle, int], Bundle], teacher: Bundle, image: Picture
) -> None:
    one = as_student(teacher, 1)
    contract = replace(one.contract, sampler="renoise", trained_times=(400,), sampling_times=(400,))
    one = replace(one, contract=contract)
    seen: list[Progress] = []
    request = Request(PROMPT, seed=3)
    result = generate(one, request, on_step=seen.append)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    conditioning = one.conditioning([PROMPT], 64, 64)
    with torch.no_grad():
        expected = one.denoiser(noise, torch.tensor([400]), conditioning).x0
    torch.testing.assert_close(seen[0].prediction.x0, expected)
    assert result.request.strength is None
    with pytest.raises(RequestError, match=r"draws from pure noise alone, .* time 400"):
        generate(one, replace(request, image=image))
