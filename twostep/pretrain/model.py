"""Nano SDXL: the real classes of SDXL at a size that trains and draws on a laptop's CPU.

64x64 pictures, latents of 4 channels on a 16x16 grid, two CLIP text encoders, a UNet of 7.3 million
parameters. Compared with SDXL: one layer a block instead of two, one transformer instead of two and
ten, a vocabulary of its own, and the tiny autoencoder class (without norms it learns faster and
draws in milliseconds).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from twostep.contract import Contract
from twostep.diffusion import VariancePreserving
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.networks.denoiser import Denoiser
from twostep.networks.sdxl_unet import SdxlUnet
from twostep.text.clip import TextEncoders

PIXELS = 64
LATENT_CHANNELS = 4
LATENT_PIXELS = 16
MAX_TOKENS = 20
TEXT_WIDTHS = (64, 96)
TEXT_LAYERS = (2, 3)
TIME_ID_WIDTH = 16
TEST_CORPUS = (
    "a an on flat 3d noto twemoji red green blue white apple fox bird background picture , in style"
)
START, END = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderTiny:
    """Return the autoencoder: 64x64x3 in -1..1 <-> 16x16x4."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 1, 3),
        num_decoder_blocks=(3, 1, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=1.0,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Return the UNet: SDXL's blocks at three resolutions, with its added conditioning."""
    return UNet2DConditionModel(
        sample_size=LATENT_PIXELS,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 3, 5),  # diffusers' name; it counts heads
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * TIME_ID_WIDTH,
        norm_num_groups=16,
    )


def build_text_encoders(corpus: Sequence[str]) -> TextEncoders:
    """Return untrained text encoders over a vocabulary in which every word of the corpus is one
    token.
    """
    tokenizers = (build_tokenizer(corpus), build_tokenizer(corpus))
    first, second = (
        _text_config(tokenizers[0], width, layers)
        for width, layers in zip(TEXT_WIDTHS, TEXT_LAYERS, strict=True)
    )
    return TextEncoders(tokenizers, (CLIPTextModel(first), CLIPTextModelWithProjection(second)))


def build_tokenizer(corpus: Sequence[str]) -> CLIPTokenizer:
    """Train a CLIP tokenizer: bytes, bytes that end a word, and the merges that make whole words of
    the corpus.
    """
    splitter = CLIPTokenizer().backend_tokenizer
    texts = [splitter.normalizer.normalize_str(text) for text in corpus]
    words = sorted(
        {word for text in texts for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text)}
    )
    merges = learn_merges(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the byte-pair merges (arXiv 1508.07909) that leave every word one token.

    The tokenizers library breaks ties by the order of a hash map, so the same corpus gave another
    vocabulary each time.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def teacher_contract(name: str, recipe: str, version: str, guidance: float) -> Contract:
    """Return what a nano teacher says of itself: 32 steps, eps, with guidance."""
    return Contract(
        name=name,
        role="teacher",
        steps=32,
        trained_times=(),
        prediction_type="eps",
        spacing="trailing",
        guidance=guidance,
        sizes=((PIXELS, PIXELS),),
        base=name,
        lora_rank=None,
        lora_alpha=None,
        recipe=recipe,
        version=version,
    )


def random_bundle(seed: int = 0, corpus: Sequence[str] = (TEST_CORPUS,)) -> Bundle:
    """Return a nano teacher with random weights, for tests; the global random state is left as it
    was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae, text = build_unet(), build_vae(), build_text_encoders(corpus)
    for network in (unet, vae, *text.encoders):
        network.requires_grad_(False).eval()
    contract = teacher_contract("random", "none", "none", guidance=4.0)
    return Bundle(
        Denoiser(SdxlUnet(unet), VariancePreserving.scaled_linear()),
        ImageCodec(vae),
        text,
        contract,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
