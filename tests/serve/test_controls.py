"""ControlNets through every API, and the same pixels from each as from a studio."""

import base64
import json
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw, ImageOps

from tests.serve.conftest import APPLE
from twostep.formats import read_contracts
from twostep.pipeline.request import Control, Picture, Request, RequestError
from twostep.pipeline.studio import Studio
from twostep.serve.a1111_controls import ControlUnit
from twostep.serve.catalogue import Catalogue, strengths

SHAPE = Image.new("RGB", (64, 64))
ImageDraw.Draw(SHAPE).ellipse((8, 24, 36, 56), fill="white")


def in_base64(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text))).convert("RGB")


@pytest.fixture(scope="module")
def expected() -> dict[str, bytes]:
    """The pixels of two seeds with a ControlNet, and of one without."""
    control = Control(Picture.of(SHAPE), scale=0.8, end=0.5)
    request = Request(APPLE, steps=4, seed=7, controls=(control,))
    studio = Studio("cpu")
    return {
        "controlled": studio.draw(request).images[0].tobytes(),
        "free": studio.draw(Request(APPLE, steps=4, seed=7)).images[0].tobytes(),
    }


def test_openai_takes_controlnets_as_further_fields(
    client: TestClient, expected: dict[str, bytes]
) -> None:
    control = {"name": "silhouette", "picture": in_base64(SHAPE), "scale": 0.8, "end": 0.5}
    body = {"prompt": APPLE, "steps": 4, "seed": 7, "controls": [control]}
    answer = client.post("/v1/images/generations", json=body).json()
    assert opened(answer["data"][0]["b64_json"]).tobytes() == expected["controlled"]
    for wrong, word in (({"name": "silhouette"}, "controls.0.picture"), (7, "controls")):
        refused = client.post("/v1/images/generations", json=body | {"controls": [wrong]})
        assert (refused.status_code, word in refused.text) == (400, True)
    files = {"image": ("a.png", base64.b64decode(in_base64(SHAPE)), "image/png")}
    fields = {"prompt": APPLE, "controls": "["}
    refused = client.post("/v1/images/edits", data=fields, files=files)
    assert (refused.status_code, "controls is no JSON" in refused.text) == (400, True)


@pytest.mark.parametrize("name", ["ControlNet", "controlnet"])
def test_a1111_takes_the_units_of_its_extension(
    client: TestClient, expected: dict[str, bytes], name: str
) -> None:
    unit: dict[str, Any] = {
        "enabled": True,
        "image": in_base64(SHAPE),
        "mask": None,
        "module": "none",
        "model": "silhouette [0123abcd]",
        "weight": 0.8,
        "resize_mode": "Resize and Fill",
        "processor_res": 512,
        "guidance_start": 0.0,
        "guidance_end": 0.5,
        "control_mode": "Balanced",
    }
    off = unit | {"enabled": False}
    none = unit | {"model": "None"}
    body = {
        "prompt": APPLE,
        "steps": 4,
        "seed": 7,
        "width": 64,
        "height": 64,
        "alwayson_scripts": {name: {"args": [unit, off, none]}},
    }
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert "x-twostep-changes" not in answer.headers
    assert opened(answer.json()["images"][0]).tobytes() == expected["controlled"]
    # Black on white, turned round by the module that does so.
    turned = unit | {"image": in_base64(ImageOps.invert(SHAPE)), "module": "invert"}
    body["alwayson_scripts"] = {name: {"args": [turned]}}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert opened(answer.json()["images"][0]).tobytes() == expected["controlled"]
    body["alwayson_scripts"] = {name: {"args": [off]}}
    answer = client.post("/sdapi/v1/txt2img", json=body)
    assert opened(answer.json()["images"][0]).tobytes() == expected["free"]


def test_a1111_says_what_of_a_unit_is_not_done(client: TestClient) -> None:
    unit = {
        "input_image": in_base64(SHAPE),
        "model": "silhouette",
        "module": "canny",
        "control_mode": 2,
        "mask": in_base64(SHAPE),
    }
    body = {"prompt": APPLE, "steps": 1, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    answer = client.post("/sdapi/v1/txt2img", json=body).json()
    changes = json.loads(answer["info"])["twostep"]["changes"]
    assert [change.split(" ")[0] for change in changes] == ["the", "control_mode", "a"]
    for wrong in (
        {"model": "canny"},
        {"input_image": ""},
        {"guidance_start": 0.6, "guidance_end": 0.4},
        {"weight": -1},
    ):
        body["alwayson_scripts"] = {"controlnet": {"args": [unit | wrong]}}
        answer = client.post("/sdapi/v1/txt2img", json=body)
        assert answer.status_code == 400, wrong
        assert set(answer.json()) == {"error", "detail", "body", "errors", "request_id"}


def test_a1111_lists_controlnets(client: TestClient) -> None:
    assert client.get("/controlnet/version").json() == {"version": 3}
    assert client.get("/controlnet/model_list").json() == {"model_list": ["silhouette"]}
    assert client.get("/controlnet/module_list").json()["module_list"] == ["none", "invert"]
    types = client.get("/controlnet/control_types").json()["control_types"]
    assert types["All"]["model_list"] == ["None", "silhouette"]
    assert client.get("/controlnet/settings").json() == {"control_net_unit_count": 4}
    assert client.get("/sdapi/v1/scripts").json()["txt2img"] == ["controlnet"]
    body = {"controlnet_module": "invert", "controlnet_input_images": [in_base64(SHAPE)]}
    (image,) = client.post("/controlnet/detect", json=body).json()["images"]
    assert np.array_equal(255 - np.asarray(SHAPE), np.asarray(opened(image)))
    refused = client.post("/controlnet/detect", json=body | {"controlnet_module": "canny"})
    assert (refused.status_code, set(refused.json())) == (
        400,
        {"error", "detail", "body", "errors", "request_id"},
    )


def test_pictures_of_another_shape_are_fitted_as_they_are_told_to() -> None:
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 5, 30, 15))
    units = {
        mode: ControlUnit(model="x", image=in_base64(wide), resize_mode=mode) for mode in (0, 1, 2)
    }
    pictures = {mode: unit.control((64, 64), None).picture.image for mode, unit in units.items()}
    assert (pictures[0].size, pictures[1].size, pictures[2].size) == ((20, 20), (40, 20), (40, 40))
    # The room above and below has the colour of the edge, which is red.
    assert pictures[2].getpixel((20, 0)) == pictures[2].getpixel((20, 39)) == (255, 0, 0)
    assert pictures[2].getpixel((20, 20)) == (0, 0, 255)


def test_controlnets_are_named_as_loras_are() -> None:
    catalogue = Catalogue(["nano"], [], ["models/depth.safetensors", "owner/canny"])
    assert catalogue.controlnets == ["depth", "canny", "silhouette"]
    with pytest.raises(RequestError, match="two ControlNets are called depth"):
        Catalogue(["nano"], [], ["a/depth", "b/depth.safetensors"])


def test_strengths_are_those_that_a_student_was_trained_at() -> None:
    teacher, *students = read_contracts("nano")
    found = {contract.steps: strengths(contract) for contract in students}
    assert found[8] == [i / 8 for i in range(1, 9)]
    assert found[4] == found[2] == found[1] == [0.25, 0.5, 0.75, 1.0]
    assert len(strengths(teacher)) == 32
    # One that takes pure noise for latents of a lower time knows no picture in it.
    assert strengths(replace(students[2], sampling_times=(999, 499))) == []


def test_a_job_brings_the_graph_for_comfyui(client: TestClient, expected: dict[str, bytes]) -> None:
    control = {"name": "silhouette", "picture": in_base64(SHAPE), "scale": 0.8, "end": 0.5}
    body = {"prompt": APPLE, "model": "nano", "steps": 4, "seed": 7, "controls": [control] * 2}
    job = client.post("/api/v1/jobs", json=body).json()
    client.get(job["events"])  # ends when the job does
    data = client.get(f"/api/v1/jobs/{job['id']}/images/0").content
    found = client.get(f"/api/v1/jobs/{job['id']}/images/0/workflow").json()
    chunks = Image.open(BytesIO(data)).info
    assert found["prompt"] == json.loads(chunks["prompt"])
    assert found["workflow"] == json.loads(chunks["workflow"])
    names = [
        node["inputs"]["image"]
        for node in found["prompt"].values()
        if node["class_type"] == "LoadImage"
    ]
    digest = json.loads(chunks["twostep"])["request"]["controls"][0]["picture"]["sha256"]
    assert names == [f"{digest[:12]}.png"] * 2
    assert found["inputs"] == {"control 1": names[0], "control 2": names[1]}
    assert client.get(f"/api/v1/jobs/{job['id']}/images/1/workflow").status_code == 404
