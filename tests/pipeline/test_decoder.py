"""A request names its decoder: the pictures are that decoder's, and their files say so."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.decoders import DARKER, nano_with_decoder
from twostep.engines.engine import registered_engine
from twostep.errors import TwostepError
from twostep.formats.locate import ModelError
from twostep.media.codec import FULL, TINY
from twostep.models.tiny_decoder import DecoderChoices
from twostep.pipeline.generation import Progress
from twostep.pipeline.order import Order
from twostep.pipeline.provenance import read_provenance, save_images, text_chunks
from twostep.pipeline.request import Picture, Request, RequestError, Result
from twostep.pipeline.studio import Studio

APPLE = "a 3d red apple on a blue background"


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(nano_with_decoder(tmp_path_factory.mktemp("model") / "mine"))


@pytest.fixture(scope="module")
def drawn(studio: Studio, model: str) -> Result:
    return studio.draw(Request(APPLE, model=model, decoder=TINY, seed=7, num_images=2))


def pixels(result: Result | TwostepError, index: int = 0) -> np.ndarray:
    assert isinstance(result, Result), result
    return np.asarray(result.images[index]).astype(int)


def test_it_draws_what_the_tiny_decoder_makes_of_the_same_latents(
    studio: Studio, model: str, drawn: Result
) -> None:
    seen: list[Progress] = []
    request = Request(APPLE, model=model, seed=7, num_images=2)
    full = studio.draw(request, on_step=seen.append)
    codec = studio.load(request).codec
    with torch.inference_mode():
        media = codec.decode_tiny(seen[-1].prediction.x0).clamp(-1, 1)
    for i, expected in enumerate(codec.items(media)):
        assert np.abs(pixels(drawn, i) - np.asarray(expected)).max() <= 1
    # The same picture, as much darker as this decoder is, but for what is cut off.
    difference = pixels(full) - pixels(drawn)
    assert np.median(difference) == pytest.approx(255 * DARKER, abs=1)


def test_the_file_says_which_decoder_it_was(drawn: Result, tmp_path: Path) -> None:
    provenance = read_provenance(save_images(drawn, tmp_path)[0])
    assert provenance.request.decoder == TINY
    assert "VAE Decoder: TAESD" in provenance.parameters
    # Its own nodes have no such decoder, and another picture is worse than none.
    assert "workflow" not in text_chunks(drawn, 0)
    old = Request.from_json('{"prompt": "x"}')
    assert old.decoder == FULL


def test_requests_with_other_decoders_share_no_batch_and_each_gets_its_own(
    studio: Studio, model: str, drawn: Result
) -> None:
    requests = [Request(APPLE, model=model, seed=7, decoder=each) for each in (TINY, FULL, TINY)]
    first, second, third = studio.submit(requests)
    assert np.abs(pixels(first) - pixels(drawn)).max() <= 1
    assert np.abs(pixels(first) - pixels(second)).max() > 1
    assert np.array_equal(pixels(first), pixels(third))


def test_a_picture_is_changed_and_painted_in_with_it(studio: Studio, model: str) -> None:
    grey = Picture.of(Image.new("RGB", (64, 64), "grey"))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    request = Request(APPLE, model=model, image=grey, strength=1.0, decoder=TINY)
    whole = studio.draw(request)
    part = studio.draw(replace(request, mask=Picture.of(mask)))
    assert whole.request.decoder == part.request.decoder == TINY
    assert np.abs(pixels(part)[:, :32] - 128).max() <= 1, "what is not masked stays"
    assert np.abs(pixels(part)[:, 32:] - 128).mean() > 5


def test_previews_are_pictures_where_there_is_a_tiny_decoder(studio: Studio, model: str) -> None:
    sizes = []
    studio.draw(
        Request(APPLE, model=model), on_step=lambda step: sizes.append(step.previews()[0].size)
    )
    assert sizes == [(64, 64)] * 2


@pytest.mark.parametrize("decoder", ["", "nowhere.safetensors", "hf:no"])
def test_a_decoder_that_is_none_is_told(decoder: str, studio: Studio) -> None:
    with pytest.raises((ModelError, RequestError), match=r"decoder"):
        studio.draw(Request(APPLE, decoder=decoder))


def test_an_order_with_a_file_of_this_folder_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.safetensors").touch()
    assert Order(APPLE, "nano", decoder="mine.safetensors").depends_on_folder
    assert not Order(APPLE, "nano", decoder=TINY).depends_on_folder
    assert Order(APPLE, "nano", decoder=TINY).request().decoder == TINY


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["openvino", "compiled"])
@pytest.mark.parametrize("num_images", [1, 3])
def test_engines_draw_the_same_with_it(
    name: str, num_images: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setenv("TWOSTEP_CACHE", str(tmp_path))
    studio = Studio("cpu")
    request = Request(APPLE, model=model, decoder=TINY, num_images=num_images)
    eager = studio.draw(request)
    other = studio.draw(replace(request, engine=name))
    assert other.request.decoder == TINY and not other.warnings
    for i in range(num_images):
        assert np.abs(pixels(eager, i) - pixels(other, i)).max() <= 1
    bundle = DecoderChoices().apply(studio.load(Request(APPLE, model=model)), TINY)
    prepared = registered_engine(name).prepare(bundle, [(64, 64)])
    assert prepared.codec.tiny.network is not bundle.codec.tiny.network
