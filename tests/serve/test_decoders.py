"""A job may ask for the tiny decoder that comes with a model, in each API's own words."""

import pytest

from tests.decoders import nano_with_decoder, plain_nano
from twostep.contract import ContractError
from twostep.media.codec import FULL, TINY
from twostep.serve.a1111_wishes import TextBody
from twostep.serve.catalogue import Catalogue, Wish
from twostep.serve.serving import wish_of
from twostep.serve.shapes import JobBody


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """A model with a tiny decoder, and one without."""
    folder = tmp_path_factory.mktemp("models")
    models = nano_with_decoder(folder / "mine"), plain_nano(folder / "plain")
    return Catalogue([str(each) for each in models])


def test_models_say_which_decoders_they_have(catalogue: Catalogue) -> None:
    models = {model["name"]: model["decoders"] for model in catalogue.describe()["models"]}
    assert models == {"mine": [FULL, TINY], "plain": [FULL]}
    # A student's decoder is that of its teacher.
    assert catalogue.find("nano-2step").decoders == [FULL, TINY]


def test_a_wish_for_it_is_fitted_or_refused(catalogue: Catalogue) -> None:
    wish = Wish("a red apple", decoder=TINY)
    assert catalogue.fit(wish, strict=True).request.decoder == TINY
    wish = Wish("a red apple", model="plain", decoder=TINY)
    fitted = catalogue.fit(wish, strict=False)
    assert fitted.request.decoder == FULL
    assert fitted.changes == ["the decoder tiny was left out: plain has none"]
    with pytest.raises(ContractError, match=r"the decoder tiny was left out"):
        catalogue.fit(wish, strict=True)


def test_each_api_has_its_own_word_for_it() -> None:
    assert wish_of(JobBody(prompt="x", decoder="tiny")).decoder == TINY
    with pytest.raises(ValueError, match=r"'full' or 'tiny'"):
        JobBody(prompt="x", decoder="/etc/passwd")
    body = TextBody(prompt="x", override_settings={"sd_vae_decode_method": "TAESD"})
    assert body.wish("nano").decoder == TINY and not body.notes()
    body = TextBody(prompt="x", override_settings={"sd_vae_decode_method": "Full"})
    assert body.wish("nano").decoder == FULL
