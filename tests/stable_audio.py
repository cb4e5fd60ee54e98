"""Tiny models of Stable Audio's classes with random weights, as diffusers saves them."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import (
    AutoencoderOobleck,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

# The scheduler's random steps, which no test takes, are torchsde's, and its import alone needs it.
sys.modules.setdefault("torchsde", ModuleType("torchsde"))
from diffusers.schedulers.scheduling_cosine_dpmsolver_multistep import (  # noqa: E402
    CosineDPMSolverMultistepScheduler,
)

WORDS = ("<pad>", "</s>", "<unk>", "rain", "on", "a", "roof", "drum", "loop", "low", "quality")
TOKENS = 6
RATE = 8_000
HOP = 8
LONGEST = 16
"""Columns of latents; a sound has 128 samples at most."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words that ends prompts as T5's does."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TOKENS,
    )


def tiny_pipeline(channels: int = 2, **scheduler: Any) -> StableAudioPipeline:
    """Return a pipeline with random weights, in which everything depends on everything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = StableAudioDiTModel(
            sample_size=LONGEST,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=32,
            cross_attention_input_dim=16,
        )
        vae = AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=channels,
            sampling_rate=RATE,
        )
        text = T5EncoderModel(
            T5Config(vocab_size=len(WORDS), d_model=12, d_kv=6, d_ff=16, num_layers=2, num_heads=2)
        )
        projection = StableAudioProjectionModel(12, 16, 0, 512)
    return StableAudioPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        projection_model=projection.eval(),
        tokenizer=tiny_tokenizer(),
        transformer=transformer.eval(),
        scheduler=CosineDPMSolverMultistepScheduler(**scheduler),
    )


def save_tiny_pipeline(folder: Path, channels: int = 2) -> StableAudioPipeline:
    """Write such a pipeline and return it."""
    pipeline = tiny_pipeline(channels)
    pipeline.save_pretrained(folder)
    return pipeline
