"""The filter: a small classifier that knows red, and what each API says of what it refuses."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from tests.serve.conftest import step_taken
from twostep.contract import Contract
from twostep.formats import read_contracts
from twostep.pipeline.request import Request, Result
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.config import FilterSettings, ServeError, Verdict
from twostep.serve.engine import Engine, EngineError, Job
from twostep.serve.gate import Rules
from twostep.serve.metrics import Metrics
from twostep.serve.picture_filter import (
    Classifier,
    FilteredStudio,
    RefusedPictureError,
    blurred,
    load_filter,
)
from twostep.serve.serving import Serving

COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200), "green": (20, 180, 40)}


def picture(name: str) -> Image.Image:
    """A picture of one colour with a black bar, so that a blur shows."""
    image = Image.new("RGB", (64, 64), COLOURS[name])
    image.paste((0, 0, 0), (24, 0, 32, 64))
    return image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a classifier that was trained here to tell red from other colours."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label={0: "harmless", 1: "red"},
        label2id={"harmless": 0, "red": 1},
    )
    network = ViTForImageClassification(config).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.02)
    for _ in range(60):
        colours = torch.rand(32, 3)
        labels = (colours[:, 0] - colours[:, 1:].amax(1) > 0).long()
        pixels = (2 * colours - 1)[:, :, None, None].expand(-1, -1, 8, 8)
        loss = network(pixel_values=pixels, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("classifier")
    network.save_pretrained(folder)
    preparation = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "resample": 2,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation))
    return folder


class Painter:
    """Draws the colours that the prompt names, one picture each, with one step before."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract

    def submit(
        self, requests: Sequence[Request], *, on_step: Any = None, on_answer: Any = None
    ) -> list[Any]:
        answers = []
        for place, request in enumerate(requests):
            words = request.prompt.split()
            on_step(place, step_taken(1, 2, [picture(word) for word in words]))
            answers.append(
                Result(
                    images=[picture(word) for word in words],
                    seeds=list(range(len(words))),
                    seconds={"denoise": 0.1},
                    warnings=["from the model"],
                    contract=self.contract,
                    request=replace(request, steps=8, guidance=1.0, width=64, height=64),
                )
            )
            if on_answer is not None:
                on_answer(place, answers[-1])
        return answers


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(read_contracts("nano")[1])


def by_colour(images: Sequence[Image.Image]) -> list[Verdict]:
    """Keep green, blur blue, refuse red."""
    verdicts: dict[tuple[int, ...], Verdict] = {
        COLOURS["red"]: "refuse",
        COLOURS["blue"]: "blur",
        COLOURS["green"]: "keep",
    }
    return [verdicts[image.getpixel((0, 0))] for image in images]  # type: ignore[index]


def test_a_classifier_judges_by_its_labels(model: Path) -> None:
    images = [picture(name) for name in ("red", "blue", "green", "red")]
    judge = Classifier(str(model), {"red": "refuse"}, 0.5)
    assert judge(images) == ["refuse", "keep", "keep", "refuse"]
    both = Classifier(str(model), {"red": "refuse", "harmless": "blur"}, 0.5)
    assert both(images[:2]) == ["refuse", "blur"]
    # With a threshold that every label passes the hardest verdict is taken.
    hardest = Classifier(str(model), {"red": "refuse", "harmless": "blur"}, 1e-12)
    assert hardest(images[1:2]) == ["refuse"]
    never = Classifier(str(model), {"red": "refuse"}, 1.0)
    assert never(images) == ["keep"] * 4


def test_what_is_no_filter_is_refused_when_the_server_starts(model: Path, tmp_path: Path) -> None:
    settings = FilterSettings(model=str(model), verdicts={"nude": "refuse"})
    with pytest.raises(ServeError, match="no label 'nude'; it has harmless, red"):
        load_filter(settings)
    with pytest.raises(ServeError, match="is no image classifier"):
        load_filter(FilterSettings(model=str(tmp_path), verdicts={"red": "refuse"}))
    for function, said in (("nowhere:x", "No module"), ("json:nothing", "no attribute")):
        with pytest.raises(ServeError, match=said):
            load_filter(FilterSettings(function=function))
    with pytest.raises(ServeError, match="is no function"):
        load_filter(FilterSettings(function="json:__doc__"))
    assert load_filter(FilterSettings(function="json:dumps")) is json.dumps  # type: ignore[comparison-overlap]


def test_pictures_are_kept_blurred_or_refused(painter: Painter) -> None:
    counted: list[Verdict] = []
    studio = FilteredStudio(painter, by_colour, counted.append)
    shown: list[Image.Image] = []
    answers = studio.submit(
        [Request("green blue", steps=2), Request("green red blue red", steps=2)],
        on_step=lambda place, progress: shown.extend(progress.previews()),
    )
    kept, refused = answers
    assert isinstance(kept, Result)
    assert kept.images[0] == picture("green")
    assert kept.images[1] == blurred(picture("blue"))
    assert kept.warnings == ["from the model", "picture 2 of 2 was blurred by the server's filter."]
    assert isinstance(refused, RefusedPictureError)
    assert str(refused).startswith("picture 2 4 of 4 was refused by the server's filter")
    assert counted == ["keep", "blur", "keep", "refuse", "blur", "refuse"]
    assert shown[0] == picture("green")
    assert shown[1:3] == [blurred(picture("blue")), picture("green")]
    assert shown[3] == blurred(picture("red"))
    # The bar is gone: no pixel stands out from its neighbour.
    assert steepest(blurred(picture("blue"))) < 6 < steepest(picture("blue"))


def steepest(image: Image.Image) -> float:
    """The largest difference between neighbours in the middle row, of 255."""
    row = np.asarray(image.convert("L"), dtype=float)[32]
    return float(np.abs(np.diff(row)).max())


@pytest.mark.parametrize("bad", [["keep"], ["keep", "maybe"], None])
def test_a_filter_that_fails_lets_nothing_through(painter: Painter, bad: Any) -> None:
    engine = Engine([FilteredStudio(painter, lambda images: bad)])
    job = engine.submit(Request("green blue", steps=2))
    with pytest.raises(EngineError, match="drawing failed"):
        job.wait(10.0)
    engine.close(10.0)


@pytest.fixture(scope="module")
def client(painter: Painter) -> Iterator[TestClient]:
    metrics = Metrics()
    engine = Engine([FilteredStudio(painter, by_colour, metrics.judged)], observers=[metrics])
    serving = Serving(engine, Catalogue(["nano"]), metrics=metrics)
    with TestClient(create_app(serving, Rules()), base_url="http://127.0.0.1") as client:
        yield client


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text))).convert("RGB")


def test_each_api_says_in_its_own_shape_what_was_refused(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "red"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("content_policy_violation", "invalid_request_error")
    assert "b64_json" not in answer.text

    answer = client.post("/sdapi/v1/txt2img", json={"prompt": "red"})
    assert (answer.status_code, answer.json()["error"]) == (400, "content_policy_violation")
    assert "refused by the server's filter" in answer.json()["detail"]

    job = client.post("/api/v1/jobs", json={"prompt": "red"}).json()
    last = client.get(job["events"]).text.strip().split("\n\n")[-1]
    assert last.startswith("event: failed")
    found = client.get(f"/api/v1/jobs/{job['id']}").json()
    assert (found["state"], found["code"]) == ("failed", "content_policy_violation")
    assert client.get(f"/api/v1/jobs/{job['id']}/images/0").status_code == 404

    body = {"prompt": "red", "stream": True, "partial_images": 1}
    events = client.post("/v1/images/generations", json=body).text.strip().split("\n\n")
    assert json.loads(events[-1].partition("data: ")[2])["error"]["code"] == error["code"]
    partial = json.loads(events[0].partition("data: ")[2])["b64_json"]
    assert opened(partial).tobytes() == blurred(picture("red")).tobytes()
    assert 'twostep_filtered_total{verdict="refuse"} 4.0' in client.get("/metrics").text


def test_what_is_blurred_is_told_as_a_warning(client: TestClient) -> None:
    answer = client.post("/v1/images/generations", json={"prompt": "blue"}).json()
    image = opened(answer["data"][0]["b64_json"])
    assert image.tobytes() == blurred(picture("blue")).tobytes()
    assert "picture 1 of 1 was blurred" in answer["twostep"]["warnings"][1]


class EndsAtOnce(Engine):
    """Gives jobs out when they have ended: whoever follows them then is as late as can be."""

    def submit(self, *args: Any, **wishes: Any) -> Job:
        job = super().submit(*args, **wishes)
        job.wait(10.0)
        return job


def test_a_stream_has_its_partial_images_however_soon_the_job_ends(painter: Painter) -> None:
    engine = EndsAtOnce([FilteredStudio(painter, by_colour, lambda verdict: None)])
    serving = Serving(engine, Catalogue(["nano"]))
    body = {"prompt": "green", "stream": True, "partial_images": 1}
    with TestClient(create_app(serving, Rules()), base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/images/generations", json=body).text
    events = answer.strip().split("\n\n")
    assert events[0].startswith("event: image_generation.partial_image")
    assert events[1].startswith("event: image_generation.completed")
    partial = json.loads(events[0].partition("data: ")[2])["b64_json"]
    assert opened(partial).tobytes() == picture("green").tobytes()
