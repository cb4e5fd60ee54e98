"""Clips and sounds through every API: what is sent, as what, and where it does not fit."""

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

import twostep
from tests.serve.conftest import GatedStudio, listening
from twostep.media.audio import Sound, read_sound, sound_picture
from twostep.media.clip import Clip, read_clip
from twostep.pipeline.request import Request, Result
from twostep.serve.app import create_app
from twostep.serve.catalogue import Catalogue
from twostep.serve.client import ServerError
from twostep.serve.engine import Engine
from twostep.serve.gate import Rules
from twostep.serve.picture_filter import FilteredStudio, RefusedPictureError
from twostep.serve.serving import Serving
from twostep.serve.store import JobStore

CLIP = {"prompt": "a 3d fox on a blue background", "model": "clips", "steps": 2, "seed": 5}
SOUND = {"prompt": "a low piano note, soft", "model": "sounds", "steps": 2, "seed": 5}
JOBS = "/api/v1/jobs"


@pytest.fixture(scope="module")
def serving(media_models: list[str], studio: GatedStudio, tmp_path_factory: Any) -> Serving:
    store = JobStore(tmp_path_factory.mktemp("jobs") / "jobs.sqlite")
    engine = Engine([studio], observers=[store])
    return Serving(engine, Catalogue(media_models), store=store)


@pytest.fixture(scope="module")
def asked(serving: Serving) -> Iterator[TestClient]:
    with TestClient(create_app(serving, Rules()), base_url="http://127.0.0.1") as client:
        yield client


def made(asked: TestClient, body: dict[str, Any]) -> dict[str, Any]:
    """Post a job, wait for its end, and return its answer."""
    posted = asked.post(JOBS, json=body)
    assert posted.status_code == 202, posted.text
    asked.get(posted.json()["events"])
    answer: dict[str, Any] = asked.get(f"{JOBS}/{posted.json()['id']}").json()
    assert answer["state"] == "done", answer
    return answer


def opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data))


def test_a_clip_is_an_animated_webp_with_its_first_frame_beside(
    asked: TestClient, tmp_path: Path
) -> None:
    answer = made(asked, CLIP | {"frames": 4})
    assert (answer["media"], answer["frames"], answer["duration_seconds"]) == ("video", 4, 0.8)
    file = asked.get(answer["images"][0])
    assert file.headers["content-type"] == "image/webp"
    assert 'filename="clips-2step_5.webp"' in file.headers["content-disposition"]
    (tmp_path / "clip.webp").write_bytes(file.content)
    clip = read_clip(tmp_path / "clip.webp")
    assert len(clip) == 4
    poster = asked.get(answer["posters"][0])
    assert poster.headers["content-type"] == "image/png"
    assert opened(poster.content).tobytes() == clip.frames[0].tobytes()
    # The model's own number of frames.
    assert made(asked, CLIP)["frames"] == 3


def test_a_clip_may_be_had_as_mp4(asked: TestClient, tmp_path: Path) -> None:
    pytest.importorskip("av")
    answer = made(asked, CLIP)
    file = asked.get(answer["images"][0], params={"format": "mp4"})
    assert file.headers["content-type"] == "video/mp4"
    assert 'filename="clips-2step_5.mp4"' in file.headers["content-disposition"]
    (tmp_path / "clip.mp4").write_bytes(file.content)
    assert len(read_clip(tmp_path / "clip.mp4")) == 3
    refused = asked.get(answer["images"][0], params={"format": "wav"})
    assert refused.status_code == 400
    assert "clips, which are sent as webp, mp4" in refused.json()["error"]["message"]


@pytest.mark.parametrize("format", [None, "flac", "ogg"])
def test_a_sound_is_a_file_with_its_spectrogram_beside(
    asked: TestClient, tmp_path: Path, format: str | None
) -> None:
    answer = made(asked, SOUND)
    assert (answer["media"], answer["duration_seconds"]) == ("audio", 1.024)
    assert "frames" not in answer
    file = asked.get(answer["images"][0], params={"format": format} if format else {})
    ending = format or "wav"
    assert file.headers["content-type"] == f"audio/{ending}"
    name = answer["checkpoint"]
    assert f'filename="{name}_5.{ending}"' in file.headers["content-disposition"]
    path = tmp_path / f"sound.{ending}"
    path.write_bytes(file.content)
    sound, texts = read_sound(path)
    assert json.loads(texts["twostep"])["request"]["prompt"] == SOUND["prompt"]
    poster = opened(asked.get(answer["posters"][0]).content)
    assert poster.size == (256, 128)
    if format is None:
        assert sound_picture(sound).size == poster.size


def test_what_a_medium_is_not_is_said(asked: TestClient) -> None:
    refused = asked.post(JOBS, json=SOUND | {"frames": 4})
    assert refused.status_code == 400
    assert "frames 4 was left out" in refused.json()["error"]["message"]
    refused = asked.post(JOBS, json=CLIP | {"frames": 0})
    assert refused.status_code == 422
    picture = made(asked, {"prompt": "a cat", "model": "nano", "steps": 1})
    assert picture["media"] == "image" and "posters" not in picture
    assert asked.get(picture["images"][0] + "/poster").status_code == 404
    for body in (CLIP, SOUND):
        image = made(asked, body)["images"][0]
        assert "ComfyUI" in asked.get(f"{image}/workflow").json()["error"]["message"]
    posted = asked.post(JOBS, json=CLIP | {"frames": 100}).json()
    asked.get(posted["events"])
    failed = asked.get(f"{JOBS}/{posted['id']}").json()
    assert (failed["state"], "1 to 8 frames, not 100" in failed["error"]) == ("failed", True)


def test_capabilities_say_the_medium_and_its_formats(asked: TestClient) -> None:
    models = {each["name"]: each for each in asked.get("/api/v1/capabilities").json()["models"]}
    found = {name: each["checkpoints"][0] for name, each in models.items()}
    assert {name: each["media"] for name, each in found.items()} == {
        "nano": "image",
        "clips": "video",
        "sounds": "audio",
    }
    assert found["sounds"]["formats"] == ["wav", "flac", "ogg"]
    assert found["clips"]["formats"][0] == "webp"
    # No picture goes into these.
    assert (found["clips"]["strengths"], found["sounds"]["strengths"]) == ([], [])


def test_stored_jobs_keep_the_file_its_type_and_what_is_shown(
    asked: TestClient, serving: Serving
) -> None:
    answers = [made(asked, SOUND), made(asked, CLIP)]
    store = serving.store
    assert store is not None
    store.unfinished()  # all ends are written down by now
    for answer in answers:
        item = store.item(answer["id"], 0)
        assert item is not None
        file = asked.get(answer["images"][0])
        assert (item.file.data, item.file.mime) == (file.content, file.headers["content-type"])
        assert item.poster == asked.get(answer["posters"][0]).content

    # A server that was started anew has them from the file.
    class Nobody:
        def submit(self, requests: Any, **_: Any) -> list[Any]:
            raise NotImplementedError

    fresh = Serving(Engine([Nobody()]), serving.catalogue, store=store)
    other = TestClient(create_app(fresh, Rules()), base_url="http://127.0.0.1")
    for answer in answers:
        for path in (answer["images"][0], answer["posters"][0]):
            before, after = asked.get(path), other.get(path)
            assert after.content == before.content
            for name in ("content-type", "content-disposition"):
                assert after.headers.get(name) == before.headers.get(name)
    assert other.get(answers[0]["images"][0], params={"format": "wav"}).status_code == 200
    refused = other.get(answers[0]["images"][0], params={"format": "flac"})
    assert (refused.status_code, ".wav" in refused.text) == (404, True)
    fresh.engine.close()


def test_openais_images_send_clips_and_refuse_sounds(asked: TestClient, tmp_path: Path) -> None:
    path = "/v1/images/generations"
    answer = asked.post(path, json=CLIP | {"frames": 2, "output_format": "png"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["output_format"] == "webp"
    assert "clips are sent as webp" in answer.headers["X-Twostep-Changes"]
    (tmp_path / "clip.webp").write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert len(read_clip(tmp_path / "clip.webp")) == 2
    refused = asked.post(path, json=SOUND)
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "sounds makes sounds" in message and "/v1/audio/speech" in message
    nano = asked.post(path, json={"prompt": "a cat", "model": "nano", "frames": 2})
    assert "frames 2 was left out: nano-2step makes pictures" in nano.headers["X-Twostep-Changes"]


def test_openais_client_gets_sounds(
    media_models: list[str], studio: GatedStudio, tmp_path: Path
) -> None:
    openai = pytest.importorskip("openai")
    with listening(studio, models=media_models) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        for format in ("wav", "flac"):
            answer = client.audio.speech.create(
                model="sounds",
                voice="none",
                input=SOUND["prompt"],
                response_format=format,
                extra_body={"steps": 2, "seed": 5},
            )
            path = tmp_path / f"sound.{format}"
            answer.write_to_file(path)
            assert read_sound(path)[0].seconds == 1.024
        with pytest.raises(openai.BadRequestError, match="/v1/images/generations"):
            client.audio.speech.create(model="nano", voice="none", input="a cat")


def test_a_format_that_is_not_there_becomes_wav_or_is_refused(
    asked: TestClient, media_models: list[str], studio: GatedStudio
) -> None:
    body = {"model": "sounds", "input": SOUND["prompt"], "response_format": "mp3", "seed": 5}
    answer = asked.post("/v1/audio/speech", json=body)
    assert answer.headers["content-type"] == "audio/wav"
    assert "response_format mp3" in answer.headers["X-Twostep-Changes"]
    assert answer.headers["X-Twostep-Seed"] == "5"
    strict = Serving(Engine([studio]), Catalogue(media_models), strict=True)
    with TestClient(create_app(strict, Rules()), base_url="http://127.0.0.1") as client:
        refused = client.post("/v1/audio/speech", json=body)
        assert (refused.status_code, "mp3" in refused.text) == (400, True)
        refused = client.post("/v1/images/generations", json=CLIP | {"output_format": "png"})
        assert (refused.status_code, "webp" in refused.text) == (400, True)


def test_a1111_sends_clips_and_refuses_sounds(asked: TestClient, tmp_path: Path) -> None:
    path = "/sdapi/v1/txt2img"
    chosen = {"prompt": CLIP["prompt"], "override_settings": {"sd_model_checkpoint": "clips"}}
    unit = {"enable": True, "video_length": 2, "format": ["GIF"]}
    scripts = {"AnimateDiff": {"args": [unit]}}
    for more in ({"frames": 2}, {"alwayson_scripts": scripts}):
        answer = asked.post(path, json=chosen | more)
        assert answer.status_code == 200, answer.text
        (tmp_path / "clip.webp").write_bytes(base64.b64decode(answer.json()["images"][0]))
        assert len(read_clip(tmp_path / "clip.webp")) == 2
        made_of = json.loads(answer.json()["info"])["twostep"]
        assert (made_of["media"], made_of["changes"]) == ("video", [])
    unit["enable"] = False
    answer = asked.post(path, json=chosen | {"alwayson_scripts": scripts})
    (tmp_path / "clip.webp").write_bytes(base64.b64decode(answer.json()["images"][0]))
    assert len(read_clip(tmp_path / "clip.webp")) == 3
    chosen["override_settings"] = {"sd_model_checkpoint": "sounds"}
    refused = asked.post(path, json=chosen)
    assert (refused.status_code, "makes sounds" in refused.json()["detail"]) == (400, True)


def test_the_client_saves_each_medium_by_its_ending(
    media_models: list[str], studio: GatedStudio, tmp_path: Path
) -> None:
    with listening(studio, models=media_models) as address, twostep.Client(address) as client:
        clip = client.draw(Request(CLIP["prompt"], model="clips", steps=2, seed=5, frames=4))
        (path,) = clip.save(tmp_path)
        assert path.name == "clips-2step_5.webp"
        assert (len(read_clip(path)), clip.images[0].n_frames) == (4, 4)
        sound = client.draw(Request(SOUND["prompt"], model="sounds", steps=2, seed=5))
        (path,) = sound.save(tmp_path)
        assert path.suffix == ".wav" and read_sound(path)[0].rate == 16_000
        with pytest.raises(ServerError, match=r"made no pictures but \.wav files"):
            _ = sound.images


def test_tools_for_language_models_send_each_medium(
    media_models: list[str], studio: GatedStudio
) -> None:
    pytest.importorskip("mcp")
    from mcp.client.client import Client as McpClient

    async def use(address: str) -> None:
        async with McpClient(f"{address}/mcp") as client:
            for wish, kind in ((CLIP, "image/webp"), (SOUND, "audio/wav")):
                answer = await client.call_tool("generate_image", wish)
                assert not answer.is_error, answer.content[0]
                assert answer.content[0].mime_type == kind

    with listening(studio, with_mcp=True, models=media_models) as address:
        asyncio.run(use(address))


def test_a_filter_judges_every_frame_and_lets_no_sound_out(
    media_models: list[str], studio: GatedStudio
) -> None:
    catalogue = Catalogue(media_models)
    clips, sounds = catalogue.find("clips").model, catalogue.find("sounds").model
    seen = []

    def judge(images: Any) -> list[str]:
        seen.append(len(images))
        return ["keep"] * (len(images) - 1) + ["blur"]

    filtered = FilteredStudio(studio, judge)
    request = Request(CLIP["prompt"], model=clips, steps=2, seed=5)
    (answer,) = filtered.submit([request])
    (plain,) = studio.submit([request])
    assert isinstance(answer, Result) and isinstance(plain, Result)
    assert seen == [3]
    clip, other = answer.images[0], plain.images[0]
    assert isinstance(clip, Clip) and len(clip) == 3
    # One frame was to be blurred, so all are.
    assert all(a.tobytes() != b.tobytes() for a, b in zip(clip.frames, other.frames, strict=True))
    assert "blurred" in answer.warnings[-1]
    (refused,) = filtered.submit([replace(request, model=sounds)])
    assert isinstance(refused, RefusedPictureError)
    assert "judges pictures alone" in str(refused)


def test_the_spectrogram_of_a_tone_is_bright_where_it_sounds() -> None:
    import numpy as np
    import torch

    seconds = torch.arange(16_384) / 16_000
    tone = 0.5 * (2 * torch.pi * 1000 * seconds).sin()
    tone[8192:] = 0
    levels = np.asarray(sound_picture(Sound(tone, 16_000)).convert("L")).astype(float)
    assert levels[:, 20:110].max() > 150 and levels[:, 150:].max() < 10
    # On the mel scale 1 kHz is 1000, and the bands reach from 63 to 2840.
    row = int(levels[:, 64].argmax())
    assert abs((128 - row) / 128 - (1000 - 63) / (2840 - 63)) < 0.04
