"""The graphs in pictures, against the definitions of ComfyUI's nodes, and what they must say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from comfyui.graph import definitions, from_page, page_problems, problems
from twostep.contract import Contract
from twostep.export.page import page_of
from twostep.formats import read_contracts
from twostep.pipeline.png import comfyui_chunks
from twostep.pipeline.request import Control, Picture, Request
from twostep.pipeline.workflow import workflow_of


def contract(steps: int) -> Contract:
    return next(each for each in read_contracts("nano") if each.steps == steps)


def settled(**changes: object) -> Request:
    values = {"seed": 7, "steps": 4, "guidance": 1.0, "width": 64, "height": 64} | changes
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


@pytest.mark.parametrize("strength", [0.3, 0.625])
def test_what_comfyui_s_nodes_cannot_do_gets_no_graph(strength: float) -> None:
    image = Picture("in.png", "0", Image.new("RGB", (64, 64)))
    assert workflow_of(contract(4), settled(image=image, strength=strength)) is None
    assert workflow_of(contract(4), settled(image=image, mask=image, strength=1.0)) is None
    control = Control(image, "silhouette")
    assert workflow_of(contract(4), settled(controls=(control,))) is None
    assert comfyui_chunks(contract(4), settled(controls=(control,))) == {}


def test_both_chunks_say_the_same() -> None:
    chunks = comfyui_chunks(contract(2), settled(steps=2))
    api, page = json.loads(chunks["prompt"]), json.loads(chunks["workflow"])
    assert from_page(page, definitions()) == {
        name: {"class_type": each["class_type"], "inputs": each["inputs"]}
        for name, each in api.items()
    }
    assert Path(node(api, "SaveImage")["filename_prefix"]).name == "nano-2step"
