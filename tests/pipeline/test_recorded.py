"""A plain picture that was drawn once by OpenVINO is drawn again without PyTorch, the same."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openvino")

from twostep.engines import openvino
from twostep.models.runtime import take_notes
from twostep.pipeline import recorded
from twostep.pipeline.generation import generate
from twostep.pipeline.provenance import text_chunks
from twostep.pipeline.recorded import draw_recorded, is_plain, key_of
from twostep.pipeline.recording import record
from twostep.pipeline.recordings import Recording, open_recording, recording_path
from twostep.pipeline.request import Control, Picture, Request, Result
from twostep.pipeline.studio import Studio

PROMPT = "a 3d red apple on a blue background"


def drawn(request: Request) -> Result | None:
    """Draw from the recording for a request, if there is one."""
    opened = open_recording(key_of(request))
    return None if opened is None else draw_recorded(opened, request)


def test_only_plain_pictures_are_recorded() -> None:
    plain = Request(PROMPT, engine="openvino")
    assert is_plain(plain)
    picture = Picture("", "")
    others = [
        replace(plain, engine="eager"),
        replace(plain, engine="onnx"),
        replace(plain, num_images=2),
        replace(plain, seed=2**32),
        replace(plain, guidance=3.0),
        replace(plain, negative_prompt="blue"),
        replace(plain, image=picture),
        replace(plain, controls=(Control(picture, "silhouette"),)),
        replace(plain, loras=("a.safetensors",)),
        replace(plain, decoder="taesdxl_decoder.safetensors"),
        replace(plain, sampler="euler"),
        replace(plain, init_noise="diffusers"),
        replace(plain, prompt="a (red:1.3) apple"),
        replace(plain, prompt="red++ apple"),
        replace(plain, prompt=r"an apple \(red\)"),
        replace(plain, prompt="an apple AND a pear"),
        replace(plain, prompt="embedding:style of an apple"),
        replace(plain, prompt="  "),
    ]
    assert [request for request in others if is_plain(request)] == []


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOSTEP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def asked(cache: Path) -> Request:
    """A request that was drawn with PyTorch and recorded."""
    request = Request(PROMPT, engine="openvino", steps=1, seed=3)
    bundle = Studio(device="cpu").load(request)
    assert record(bundle, request, generate(bundle, request))
    return request


@pytest.mark.slow
def test_other_prompts_and_seeds_give_the_files_that_pytorch_gives(asked: Request) -> None:
    studio = Studio(device="cpu")
    prompts = ["a flat fox", "a house beside a tree", "the glorbish zzyzx", "ÄPFEL, 3!"]
    for seed, prompt in enumerate(prompts):
        request = replace(asked, prompt=prompt, seed=seed)
        ours, theirs = drawn(request), studio.draw(request)
        assert ours is not None, prompt
        assert ours.images[0].tobytes() == theirs.images[0].tobytes()
        assert ours.warnings == theirs.warnings
        assert text_chunks(ours, 0) == text_chunks(theirs, 0)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 4])
def test_several_steps_are_one_graph_that_is_opened_in_pieces(steps: int, cache: Path) -> None:
    request = Request(PROMPT, engine="openvino", steps=steps, seed=3)
    studio = Studio(device="cpu")
    bundle = studio.load(request)
    assert record(bundle, request, generate(bundle, request))
    for seed in range(4):
        again = replace(request, prompt="a noto owl", seed=seed)
        ours, theirs = drawn(again), studio.draw(again)
        assert ours is not None
        assert ours.images[0].tobytes() == theirs.images[0].tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "decoder"), [("openvino", "full"), ("openvino-int8", "tiny")])
def test_networks_that_are_called_once_a_step_are_recorded_too(
    engine: str, decoder: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    # As of a network that is large.
    monkeypatch.setattr(openvino, "is_large", lambda network: True)
    request = Request(PROMPT, engine=engine, decoder=decoder, steps=2, width=64, height=64)
    bundle = Studio(device="cpu").load(request)
    assert record(bundle, request, generate(bundle, request))
    again = replace(request, prompt="a flat fox", seed=11)
    ours, theirs = drawn(again), generate(bundle, again)
    assert ours is not None
    assert ours.images[0].tobytes() == theirs.images[0].tobytes()
    assert text_chunks(ours, 0) == text_chunks(theirs, 0)
    # Another engine's recording is another one, and another decoder's.
    assert drawn(replace(again, engine="openvino-bf16")) is None
    assert drawn(replace(again, decoder="tiny" if decoder == "full" else "full")) is None


@pytest.mark.slow
def test_a_long_prompt_is_left_to_pytorch(asked: Request) -> None:
    assert drawn(replace(asked, prompt="a red apple " * 40)) is None


@pytest.mark.slow
def test_what_is_damaged_or_old_is_not_used(asked: Request) -> None:
    path = recording_path(key_of(asked))
    whole = path.read_text()
    recording = Recording.from_json(whole)
    moved = replace(recording.files[0], modified=0)
    gone = replace(recording.files[0], path="/nowhere")
    for text in (
        "",
        "[]",
        "{}",
        whole[:-10],
        whole.replace('"settled"', '"other"'),
        replace(recording, versions={**recording.versions, "torch": "0"}).to_json(),
        replace(recording, files=(moved,)).to_json(),
        replace(recording, files=(gone,)).to_json(),
        replace(recording, tokenizers=("/nowhere", "/nowhere")).to_json(),
        replace(recording, denoiser=replace(recording.denoiser, name="0" * 32)).to_json(),
    ):
        path.write_text(text)
        assert drawn(asked) is None
    path.write_text(whole)
    take_notes()
    assert drawn(asked) is not None


@pytest.mark.slow
def test_a_damaged_network_is_told_and_left_to_pytorch(asked: Request, cache: Path) -> None:
    recording = Recording.from_json(recording_path(key_of(asked)).read_text())
    path = cache / "engines" / f"{recording.denoiser.name}.blob"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    take_notes()
    assert drawn(asked) is None
    (note,) = take_notes()
    assert "was not usable and is made anew" in note
    path.write_bytes(whole)


@pytest.mark.slow
def test_a_recording_that_does_not_draw_the_same_is_not_kept(
    asked: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recording_path(key_of(asked))
    whole = path.read_text()
    bundle = Studio(device="cpu").load(asked)
    result = generate(bundle, asked)
    other_noise = recorded.torch_noise
    monkeypatch.setattr(recorded, "torch_noise", lambda seed, count: other_noise(seed + 1, count))
    assert not record(bundle, asked, result)
    assert not path.exists()
    path.write_text(whole)


@pytest.mark.slow
def test_a_second_command_loads_no_pytorch_and_writes_the_same_file(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from twostep.cli import app\n"
        "try:\n"
        "    app(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code, ended\n"
        "print('torch' in sys.modules)\n"
    )
    environment = {**os.environ, "TWOSTEP_CACHE": str(tmp_path / "cache")}

    def run(out: Path, *more: str) -> tuple[list[bytes], bool]:
        words = ["generate", PROMPT, "--steps", "1", "--seed", "5", "-o", str(out), *more]
        ended = subprocess.run(
            [sys.executable, "-c", script, *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        *paths, has_torch = ended.stdout.split()
        return [Path(path).read_bytes() for path in paths], json.loads(has_torch.lower())

    with_openvino = ("--engine", "openvino")
    first, first_has_torch = run(tmp_path / "first", *with_openvino)
    second, second_has_torch = run(tmp_path / "second", *with_openvino)
    assert (first_has_torch, second_has_torch) == (True, False)
    assert second == first
    # What was not recorded goes its usual way.
    assert run(tmp_path / "other", *with_openvino, "--num-images", "2")[1]
    assert run(tmp_path / "eager")[1]
