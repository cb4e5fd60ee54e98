"""The graphs in pictures, against the definitions of ComfyUI's nodes, and what they must say."""

import json
import random
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from comfyui.graph import definitions, from_page, page_problems, problems
from twostep.contract import Contract, EdmSpec, RectifiedFlowSpec, VariancePreservingSpec
from twostep.export.page import page_of
from twostep.formats import read_contracts
from twostep.pipeline.provenance import comfyui_chunks
from twostep.pipeline.request import Control, ModelTraits, Picture, Request
from twostep.pipeline.workflow import workflow_of


def contract(steps: int) -> Contract:
    return next(each for each in read_contracts("nano") if each.steps == steps)


SETTLED = {"seed": 7, "steps": 4, "guidance": 1.0, "width": 64, "height": 64}

TEACHER = read_contracts("nano")[0]

RENOISING = replace(contract(4), name="lcm", sampler="renoise")


def settled(**changes: object) -> Request:
    values = SETTLED | changes
    return Request("a fox", **values)  # type: ignore[arg-type]


def node(graph: dict, kind: str) -> dict:
    (found,) = [each["inputs"] for each in graph.values() if each["class_type"] == kind]
    return found


def test_a_student_s_picture_opens_its_sampling() -> None:
    graph = workflow_of(contract(4), settled(model="sdxl/base.safetensors"))
    assert problems(graph, definitions()) == []
    assert page_problems(page_of(graph), definitions()) == []
    sampler = node(graph, "KSampler")
    assert (sampler["sampler_name"], sampler["scheduler"]) == ("euler", "simple")
    assert (sampler["steps"], sampler["cfg"], sampler["seed"], sampler["denoise"]) == (4, 1.0, 7, 1)
    assert node(graph, "CheckpointLoaderSimple") == {"ckpt_name": "base.safetensors"}
    assert graph[sampler["positive"][0]]["inputs"]["text"] == "a fox"
    assert graph[sampler["negative"][0]]["inputs"]["text"] == ""


def test_one_step_students_predict_x0_there_too() -> None:
    graph = workflow_of(contract(1), settled(steps=1))
    assert node(graph, "ModelSamplingDiscrete")["sampling"] == "x0"
    assert node(graph, "KSampler")["model"][0] == next(
        name for name, each in graph.items() if each["class_type"] == "ModelSamplingDiscrete"
    )


def test_loras_follow_each_other_with_their_weights() -> None:
    request = settled(model="base", loras=("a/ink.safetensors:0.8", "wool:-0.5"))
    graph = workflow_of(contract(4), request)
    assert problems(graph, definitions()) == []
    loras = [each["inputs"] for each in graph.values() if each["class_type"] == "LoraLoader"]
    assert [(lora["lora_name"], lora["strength_model"]) for lora in loras] == [
        ("ink.safetensors", 0.8),
        ("wool.safetensors", -0.5),
    ]
    assert loras[1]["model"] == ["2", 0] and loras[1]["clip"] == ["2", 1]


def test_a_lora_as_the_model_goes_on_its_base() -> None:
    student = replace(contract(4), lora_rank=16, lora_alpha=16.0)
    graph = workflow_of(student, settled(model="nano_4step_lora"))
    assert node(graph, "CheckpointLoaderSimple") == {"ckpt_name": "nano.safetensors"}
    assert node(graph, "LoraLoader")["lora_name"] == "nano_4step_lora.safetensors"
    graph = workflow_of(student, settled(model="nano", loras=("nano_4step_lora:0.9",)))
    assert node(graph, "LoraLoader")["strength_model"] == 0.9
    # The LoRA makes the student of the teacher: the student's own network has no place there.
    for merged in (student, contract(4)):
        graph = workflow_of(merged, settled(model="nano", loras=("nano_4step_lora:0.9",)))
        assert "UNETLoader" not in {each["class_type"] for each in graph.values()}
        assert node(graph, "CheckpointLoaderSimple") == {"ckpt_name": "nano.safetensors"}


def test_a_changed_image_begins_in_the_middle_of_the_grid() -> None:
    image = Picture("in.png", "0", Image.new("RGB", (64, 64)))
    graph = workflow_of(contract(4), settled(image=image, strength=0.75))
    split = node(graph, "SplitSigmas")
    assert split["step"] == 1 and node(graph, "BasicScheduler")["steps"] == 4
    sampler = node(graph, "SamplerCustom")
    assert sampler["sigmas"][1] == 1 and sampler["noise_seed"] == 7 and sampler["add_noise"]
    assert node(graph, "LoadImage") == {"image": "in.png"}
    page = page_of(graph)
    assert len(page["links"]) == sum(
        isinstance(value, list) for each in graph.values() for value in each["inputs"].values()
    )


@pytest.mark.parametrize(("steps", "taken"), [(3, 3), (6, 6), (12, 5)])
def test_times_that_simple_misses_are_written_out(steps: int, taken: int) -> None:
    """The levels are sigma / alpha of SDXL's scaled linear betas, worked out anew."""
    changes = {"steps": steps, "model": "sdxl/base.safetensors", "guidance": 5.0}
    times = [round(Fraction(1000 * k, steps)) for k in range(steps, 0, -1)]
    if taken < steps:
        image = Picture("in.png", "0", Image.new("RGB", (64, 64)))
        changes |= {"image": image, "strength": times[steps - taken] / 1000}
    graph = workflow_of(TEACHER, settled(**changes))
    assert problems(graph, definitions()) == []
    assert page_problems(page_of(graph), definitions()) == []
    written = [float(each) for each in node(graph, "ManualSigmas")["sigmas"].split(", ")]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.concatenate([[1.0], np.cumprod(1 - betas)])
    expected = [((1 - kept[t]) / kept[t]) ** 0.5 for t in [*times[steps - taken :], 0]]
    np.testing.assert_allclose(written, expected, atol=2e-9)
    sampler = node(graph, "SamplerCustom")
    assert (sampler["cfg"], sampler["noise_seed"], sampler["add_noise"]) == (5.0, 7, True)


@pytest.mark.parametrize("steps", range(1, 51))
def test_comfyui_s_simple_is_used_only_where_it_visits_the_same_times(steps: int) -> None:
    """Its index i of a table of 1000 levels is int(k * 1000 / steps) from the end."""
    simple = [1000 - int(k * (1000 / steps)) for k in range(steps)]
    trailing = [round(Fraction(1000 * k, steps)) for k in range(steps, 0, -1)]
    graph = workflow_of(TEACHER, settled(steps=steps, model="base.safetensors"))
    kinds = {each["class_type"] for each in graph.values()}
    assert ("KSampler" in kinds) == (simple == trailing)
    assert ("ManualSigmas" in kinds) == (simple != trailing)


def test_solvers_have_comfyui_s_name_or_no_graph() -> None:
    request = settled(steps=8, sampler="dpmpp-2m", model="base.safetensors")
    assert node(workflow_of(TEACHER, request), "KSampler")["sampler_name"] == "dpmpp_2m"
    assert workflow_of(TEACHER, replace(request, sampler="unipc")) is None


def test_fresh_noise_is_that_of_a_seed_for_every_step() -> None:
    graph = workflow_of(RENOISING, settled(model="lcm.safetensors"))
    assert problems(graph, definitions()) == []
    samplers = [each["inputs"] for each in graph.values() if each["class_type"] == "SamplerCustom"]
    assert [sampler["noise_seed"] for sampler in samplers] == [
        7,
        *(random.Random(f"7/{i}").getrandbits(31) for i in range(3)),
    ]
    assert all(sampler["add_noise"] for sampler in samplers)
    for before, after in pairwise(samplers):
        levels = graph[after["sigmas"][0]]["inputs"]["sigmas"].split(", ")
        assert levels[1] == "0" and graph[after["latent_image"][0]]["inputs"] == before


def test_pure_noise_below_the_top_is_longer_than_its_level() -> None:
    one = replace(RENOISING, steps=1, sampling_times=(400,), trained_times=(400,))
    graph = workflow_of(one, settled(steps=1, model="one.safetensors"))
    assert problems(graph, definitions()) == []
    level = float(graph[node(graph, "AddNoise")["sigmas"][0]]["inputs"]["sigmas"])
    longer = node(graph, "LatentMultiply")["multiplier"]
    assert longer * level == pytest.approx((1 + level**2) ** 0.5, rel=1e-8)
    assert not node(graph, "SamplerCustom")["add_noise"]


def test_a_mask_is_drawn_from_pure_noise_step_by_step() -> None:
    image = Picture("in.png", "0", Image.new("RGB", (64, 64)))
    mask = Picture("mask.png", "1", Image.new("RGB", (64, 64)))
    request = settled(image=image, mask=mask, strength=1.0, model="base.safetensors")
    graph = workflow_of(TEACHER, replace(request, steps=4))
    assert problems(graph, definitions()) == []
    kinds = Counter(each["class_type"] for each in graph.values())
    # Noise that is put back at three levels, and at the end the image itself.
    assert (kinds["SamplerCustom"], kinds["LatentCompositeMasked"], kinds["AddNoise"]) == (4, 4, 3)
    assert kinds["ImageCompositeMasked"] == 1 and kinds["ImageScale"] == 1
    noises = [each["inputs"] for each in graph.values() if each["class_type"] == "RandomNoise"]
    assert noises == [{"noise_seed": 7}] * 3
    assert workflow_of(TEACHER, replace(request, steps=9)) is None
    half = workflow_of(TEACHER, replace(request, steps=20, strength=0.5))
    assert problems(half, definitions()) == []
    assert node(half, "SamplerCustom")["latent_image"][0] == next(
        name for name, each in half.items() if each["class_type"] == "SetLatentNoiseMask"
    )


def test_pictures_of_another_shape_are_scaled_and_then_cut() -> None:
    image = Picture("in.png", "0", Image.new("RGB", (300, 200)))
    graph = workflow_of(TEACHER, settled(image=image, strength=0.5, steps=8, model="b.safetensors"))
    scaled, cut = node(graph, "ImageScale"), node(graph, "ImageCrop")
    assert (scaled["width"], scaled["height"], scaled["crop"]) == (96, 64, "disabled")
    assert (cut["x"], cut["y"], cut["width"], cut["height"]) == (16, 0, 64, 64)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0.0, 1.0, (0, 4)), (0.25, 1.0, (1, 4)), (0.0, 0.5, (0, 2)), (0.3, 0.8, (2, 3))],
)
def test_controls_act_in_the_same_steps(start: float, end: float, expected: tuple) -> None:
    picture = Picture("lines.png", "0", Image.new("RGB", (64, 64)))
    control = Control(picture, "nets/lines.safetensors", 0.7, start, end)
    request = settled(controls=(control,), steps=4, model="base.safetensors", guidance=5.0)
    graph = workflow_of(TEACHER, request)
    assert problems(graph, definitions()) == []
    applied = node(graph, "ControlNetApplyAdvanced")
    assert applied["strength"] == 0.7
    assert node(graph, "ControlNetLoader") == {"control_net_name": "lines.safetensors"}
    # ComfyUI acts where the level lies between those of two percents, of indices 999 to 0.
    indices = [999, 749, 499, 249]
    highest, lowest = ((1 - applied[f"{end}_percent"]) * 999 for end in ("start", "end"))
    acting = [i for i, index in enumerate(indices) if lowest <= index <= highest]
    assert acting == list(range(*expected))
    never = replace(control, start=0.3, end=0.4)
    graph = workflow_of(TEACHER, replace(request, controls=(never,)))
    assert "ControlNetLoader" not in {each["class_type"] for each in graph.values()}


def test_prompts_are_written_as_comfyui_reads_them() -> None:
    def text(prompt: str) -> str | None:
        graph = workflow_of(TEACHER, Request(prompt, **SETTLED, model="base.safetensors"))
        return None if graph is None else graph["2"]["inputs"]["text"]

    assert text("a fox, red") == "a fox, red"
    assert text(r"a \(small\) fox") == r"a \(small\) fox"
    assert text("a ((red)) fox++") == "a (red fox:1.21)"
    for other in ("a [red] fox", "(fox:0.9)", "a fox BREAK red", '("a", "b").blend(1, 1)'):
        assert text(other) is None


def test_the_empty_prompt_may_be_all_zeros() -> None:
    request = settled(model="base.safetensors", guidance=5.0)
    graph = workflow_of(TEACHER, request, ModelTraits(zeros_for_empty=True))
    (zeros,) = [name for name, each in graph.items() if each["class_type"] == "ConditioningZeroOut"]
    assert node(graph, "KSampler")["negative"] == [zeros, 0]
    assert "ConditioningZeroOut" not in str(workflow_of(TEACHER, request))


def test_students_in_a_folder_are_loaded_by_the_file_they_lie_in() -> None:
    graph = workflow_of(contract(4), settled())
    assert node(graph, "UNETLoader")["unet_name"] == "nano_4step_unet.safetensors"
    assert node(graph, "CheckpointLoaderSimple") == {"ckpt_name": "nano.safetensors"}


def test_what_comfyui_s_nodes_cannot_do_gets_no_graph() -> None:
    request = settled(model="base.safetensors")
    image = Picture("in.png", "0", Image.new("RGB", (64, 64)))
    coloured = Picture("mask.png", "1", Image.new("RGB", (64, 64), "yellow"))
    deep = replace(image, is_eight_bit=False)
    assert workflow_of(TEACHER, request) is not None
    others = {
        "init_noise": replace(request, init_noise="diffusers"),
        "embeddings": replace(request, embeddings=("words.safetensors",)),
        "16 bits": replace(request, image=deep, strength=0.5),
        "a mask in colours": replace(request, image=image, mask=coloured, strength=0.5),
        "a strong control": replace(request, controls=(Control(image, "c", 11.0),)),
    }
    for what, other in others.items():
        assert workflow_of(TEACHER, other) is None, what
        assert comfyui_chunks(TEACHER, other, ModelTraits()) == {}
    assert workflow_of(TEACHER, request, ModelTraits(is_inpainting=True)) is None
    assert workflow_of(TEACHER, request, ModelTraits(is_long=True)) is None
    for spec in (EdmSpec(), VariancePreservingSpec(betas="linear")):
        assert workflow_of(replace(TEACHER, schedule=spec), request) is None
    flow = replace(TEACHER, schedule=RectifiedFlowSpec(), prediction_type="flow")
    assert workflow_of(flow, request) is None


def test_both_chunks_say_the_same() -> None:
    chunks = comfyui_chunks(contract(2), settled(steps=2), ModelTraits())
    api, page = json.loads(chunks["prompt"]), json.loads(chunks["workflow"])
    assert from_page(page, definitions()) == {
        name: {"class_type": each["class_type"], "inputs": each["inputs"]}
        for name, each in api.items()
    }
    assert Path(node(api, "SaveImage")["filename_prefix"]).name == "nano-2step"
