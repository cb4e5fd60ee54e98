"""Textual inversions in prompts: the very vectors, for both encoders, and what is none refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twostep.formats.embeddings import EmbeddingError, find_embeddings
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.lora_stack import LoraCache
from twostep.pipeline.request import Request, RequestError
from twostep.text.prompt_weights import PromptError


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano")


def vectors_of(bundle: Bundle, words: str) -> dict[str, torch.Tensor]:
    """Return the encoders' own vectors of words that are single tokens, by clip_l and clip_g."""
    named = {}
    for key, tokenizer, encoder in zip(
        ("clip_l", "clip_g"), bundle.text.tokenizers, bundle.text.encoders, strict=True
    ):
        ids = tokenizer(words).input_ids[1:-1]
        assert len(ids) == len(words.split())
        named[key] = encoder.get_input_embeddings().weight[ids].detach().clone()
    return named


def embedded(bundle: Bundle, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode():
        return bundle.text.encode_whole([prompt])


def assert_same(ours: Bundle, prompt: str, bundle: Bundle, plain: str) -> None:
    for left, right in zip(embedded(ours, prompt), embedded(bundle, plain), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "prompt",
    [
        "a 3d embedding:ink on a blue background",
        "a 3d embedding:ink.safetensors on a blue background",
        "a 3d ink on a blue background",
    ],
)
def test_an_embedding_of_two_words_is_these_words(
    prompt: str, bundle: Bundle, tmp_path: Path
) -> None:
    save_file(vectors_of(bundle, "red apple"), tmp_path / "ink.safetensors")
    ours = bundle.with_embeddings(find_embeddings([tmp_path]))
    assert_same(ours, prompt, bundle, "a 3d red apple on a blue background")
    assert ours.text.unknown_words(prompt) == []
    assert_same(ours, "a drink", bundle, "a drink")
    assert_same(ours, "a dog", bundle, "a dog")


def test_names_may_be_parts_of_each_other_and_of_the_tokens(bundle: Bundle, tmp_path: Path) -> None:
    """`emb0v0` is what the token of the first one, `<emb0v0>`, is called inside."""
    for name, words in {"emb0v0": "red", "ink": "apple", "red ink": "dog", "v0": "fox"}.items():
        save_file(vectors_of(bundle, words), tmp_path / f"{name}.safetensors")
    ours = bundle.with_embeddings(find_embeddings([tmp_path]))
    assert_same(ours, "a emb0v0 ink beside a red ink", bundle, "a red apple beside a dog")
    assert_same(ours, "a embedding:emb0v0 embedding:v0", bundle, "a red fox")


def test_a_single_vector_may_be_stored_without_a_row(bundle: Bundle, tmp_path: Path) -> None:
    vectors = vectors_of(bundle, "red")
    save_file({key: value[0].clone() for key, value in vectors.items()}, tmp_path / "x.safetensors")
    ours = bundle.with_embeddings(find_embeddings([tmp_path]))
    assert_same(ours, "a x apple", bundle, "a red apple")


def test_it_can_be_weighed_and_cut(bundle: Bundle, tmp_path: Path) -> None:
    save_file(vectors_of(bundle, "red"), tmp_path / "ink.safetensors")
    ours = bundle.with_embeddings(find_embeddings([tmp_path / "ink.safetensors"]))
    assert_same(ours, "a (embedding:ink:1.3) apple", bundle, "a (red:1.3) apple")


def test_diffusers_two_files_and_onetrainer_s_bundle(bundle: Bundle, tmp_path: Path) -> None:
    both = vectors_of(bundle, "red")
    (tmp_path / "pair").mkdir()
    save_file({"<ink>": both["clip_l"]}, tmp_path / "pair" / "learned_embeds.safetensors")
    save_file({"<ink>": both["clip_g"]}, tmp_path / "pair" / "learned_embeds_2.safetensors")
    ours = bundle.with_embeddings(find_embeddings([tmp_path / "pair"]))
    assert_same(ours, "a <ink> apple", bundle, "a red apple")
    out, wide = bundle.parts["unet"].down_blocks[1].attentions[0].proj_in.weight.shape[:2]
    lora = {
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(1, wide),
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(out, 1),
        "bundle_emb.my ink.clip_l": both["clip_l"],
        "bundle_emb.my ink.clip_g": both["clip_g"],
    }
    save_file(lora, tmp_path / "lora.safetensors")
    for made in (
        load_with_loras("nano", [str(tmp_path / "lora.safetensors")], embeddings=()),
        LoraCache(bundle).apply([str(tmp_path / "lora.safetensors")]),
    ):
        assert_same(made, "a my ink apple", bundle, "a red apple")
    alone = load_with_loras("nano", [str(tmp_path / "lora.safetensors")])
    encoders = zip(alone.text.encoders, bundle.text.encoders, strict=True)
    assert all(ours.state_dict().keys() == theirs.state_dict().keys() for ours, theirs in encoders)


def test_one_that_is_not_there_is_told(bundle: Bundle) -> None:
    with pytest.raises(PromptError, match="asks for embedding:ink, and there are none"):
        bundle.text.encode_whole(["a embedding:ink apple"])


ODD = {
    "one encoder alone": ({"clip_l": torch.ones(1, 64)}, "for text_encoder alone"),
    "another number for the second": (
        {"clip_l": torch.ones(1, 64), "clip_g": torch.ones(2, 96)},
        "as many for both",
    ),
    "more beside": (
        {"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 96), "x": torch.ones(1)},
        "has x beside clip_l",
    ),
    "Stable Diffusion 1's": ({"emb_params": torch.ones(1, 768)}, "expected a textual inversion"),
    "no vectors": ({"clip_l": torch.ones(0, 64), "clip_g": torch.ones(0, 96)}, "expected"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_none_is_refused(name: str, tmp_path: Path) -> None:
    tensors, lesson = ODD[name]
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(EmbeddingError, match=lesson):
        find_embeddings([tmp_path])


def test_one_of_another_width_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    tensors = {"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}
    save_file(tensors, tmp_path / "sdxl.safetensors")
    with pytest.raises(EmbeddingError, match="768 numbers for text_encoder, which here has 64"):
        bundle.with_embeddings(find_embeddings([tmp_path]))


def test_a_lora_in_the_prompt_is_one_of_the_request() -> None:
    request = Request("a <lora:ink:0.8> red <lora:wool> apple", loras=("flat",))
    assert request.prompt == "a red apple"
    assert [str(lora) for lora in request.loras] == ["flat", "ink:0.8", "wool"]
    assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize("tag", ["<lora:a:0.8:0.5>", "<lora:a:lbw=1>", "<hypernet:a:1>", "<lora:>"])
def test_tags_that_say_more_are_refused(tag: str) -> None:
    with pytest.raises(RequestError, match="expected <lora:FILE> or <lora:FILE:WEIGHT>"):
        Request(f"a {tag} dog")
