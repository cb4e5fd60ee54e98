"""OpenVINO GenAI's own pipeline as a peer: a model written as that library reads it, and drawn.

It reads a folder with a compiled form of every network, of the kind that optimum-intel writes:
inputs have fixed names, text encoders give all their hidden states, and tokenizers are networks as
well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twostep.engines.openvino import unreported
from twostep.models.bundle import Bundle
from twostep.models.sdxl import autoencoder, diffusers_scheduler, text_encoders

_MODEL = "openvino_model.xml"

_PACKAGES = ("openvino_genai", "openvino_tokenizers")


def has_genai() -> bool:
    """Return whether the library is installed."""
    return all(find_spec(name) is not None for name in _PACKAGES)


def is_readable(bundle: Bundle) -> bool:
    """Return whether the library can draw with a model: pictures, with whole numbers as times."""
    is_of_pictures = bundle.contract.media == "image"
    return is_of_pictures and isinstance(bundle.denoiser.schedule.top, int)


def guidance_of(bundle: Bundle) -> float:
    """Return the guidance scale of a model as these pipelines take it: 1 for students, for none."""
    return 1.0 if bundle.contract.role == "student" else bundle.contract.guidance


def write_folder(bundle: Bundle, folder: Path, *, size: tuple[int, int], batch: int) -> None:
    """Write a model of SDXL's kind for GenAI.

    Args:
        bundle: with the networks of diffusers and transformers, in float32 on the CPU.
        folder: is made.
        size: (width, height) of the pictures in pixels.
        batch: pictures at once.
    """
    copies = 2 if guidance_of(bundle) > 1 else 1
    text = text_encoders(bundle)
    names = ("text_encoder", "text_encoder_2")
    with torch.no_grad():
        for name, encoder, tokenizer in zip(names, text.encoders, text.tokenizers, strict=True):
            _write_text_encoder(encoder, tokenizer, folder / name, copies)
        _write_unet(bundle, folder / "unet", size=size, rows=copies * batch)
        _write_decoder(bundle, folder / "vae_decoder", size=size, batch=batch)
    diffusers_scheduler(bundle.contract).save_config(folder / "scheduler")
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            # Whatever it is: the library reads a decoder of any kind under this name.
            "vae": ["diffusers", "AutoencoderKL"],
            "force_zeros_for_empty_prompt": text.zeros_for_empty,
        },
    )


def open_pipeline(
    folder: Path, settings: Mapping[str, Any], *, size: tuple[int, int], batch: int, guidance: float
) -> Callable[[str, int, int], Any]:
    """Compile what `write_folder` wrote; return a function of prompt, seed and steps that draws.

    It returns pictures as uint8 [batch, height, width, 3]; noise is torch's of the seed.

    Args:
        folder: that was written.
        settings: of OpenVINO.
        size: (width, height) of the pictures in pixels.
        batch: pictures at once.
        guidance: scale of classifier-free guidance, 1 for none.
    """
    import openvino_genai

    width, height = size
    pipeline = openvino_genai.Text2ImagePipeline(str(folder))
    pipeline.reshape(batch, height, width, guidance)
    pipeline.compile("CPU", **settings)

    def draw(prompt: str, seed: int, steps: int) -> Any:
        pictures = pipeline.generate(
            prompt,
            width=width,
            height=height,
            num_inference_steps=steps,
            num_images_per_prompt=batch,
            guidance_scale=guidance,
            generator=openvino_genai.TorchGenerator(seed),
        )
        return pictures.data

    return draw


class _Flat(nn.Module):
    """A network that is called, and answers, as a function says."""

    def __init__(self, network: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.network = network
        self._call = call

    def forward(self, *tensors: Tensor) -> Any:
        return self._call(self.network, *tensors)


def _write_text_encoder(encoder: Any, tokenizer: Any, folder: Path, rows: int) -> None:
    """Write an encoder with all its hidden states, and its tokenizer beside it."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    def call(network: Any, ids: Tensor) -> tuple[Tensor, ...]:
        output = network(ids, output_hidden_states=True)
        # The pooled embedding comes first of the second encoder, and second of the first one.
        first = (
            (output.text_embeds, output.last_hidden_state)
            if "text_embeds" in output
            else (output.last_hidden_state, output.pooler_output)
        )
        return (*first, *output.hidden_states)

    length = encoder.config.max_position_embeddings
    tokens = torch.ones(rows, length, dtype=torch.int64)
    _write(encoder, call, {"input_ids": tokens}, folder)
    _write_json(
        folder / "config.json",
        {
            "max_position_embeddings": length,
            "num_hidden_layers": encoder.config.num_hidden_layers,
        },
    )
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    beside.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(beside)
    openvino.save_model(
        convert_tokenizer(tokenizer, with_detokenizer=False), beside / "openvino_tokenizer.xml"
    )


def _write_unet(bundle: Bundle, folder: Path, *, size: tuple[int, int], rows: int) -> None:
    """Write the UNet for latents of pictures of a size."""
    unet: Any = bundle.denoiser.network
    width, height = size
    conditioning = bundle.conditioning([""], width, height).expand(rows)
    _, latent_height, latent_width = bundle.latent_shape(width, height)

    def call(
        network: Any, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor, sizes: Tensor
    ) -> Tensor:
        beside = {"text_embeds": pooled, "time_ids": sizes}
        answer: Tensor = network(x, time, text, added_cond_kwargs=beside, return_dict=False)[0]
        return answer

    example = {
        "sample": torch.zeros(rows, unet.config.in_channels, latent_height, latent_width),
        "timestep": torch.ones(1, dtype=torch.int64),
        "encoder_hidden_states": conditioning.text,
        "text_embeds": conditioning.pooled,
        "time_ids": conditioning.sizes,
    }
    _write(unet, call, example, folder)
    config = {"in_channels": unet.config.in_channels, "sample_size": max(latent_height, 1)}
    _write_json(folder / "config.json", config)


def _write_decoder(bundle: Bundle, folder: Path, *, size: tuple[int, int], batch: int) -> None:
    """Write the autoencoder's decoder."""
    vae: Any = autoencoder(bundle)
    channels, height, width = bundle.latent_shape(*size)

    def call(network: Any, latents: Tensor) -> Tensor:
        pictures: Tensor = network.decode(latents, return_dict=False)[0]
        return pictures

    _write(vae, call, {"latent_sample": torch.zeros(batch, channels, height, width)}, folder)
    config = {
        "latent_channels": channels,
        "scaling_factor": vae.config.scaling_factor,
        # It counts them, to know how many pixels there are to a latent.
        "block_out_channels": list(vae.config.block_out_channels),
    }
    _write_json(folder / "config.json", config)


def _write(
    network: nn.Module, call: Callable[..., Any], example: Mapping[str, Tensor], folder: Path
) -> None:
    """Write a network for tensors of these names and shapes, in the precision that it has."""
    import openvino

    tensors: Sequence[Tensor] = tuple(example.values())
    with unreported():
        model = openvino.convert_model(
            _Flat(network, call).eval(),
            example_input=tuple(tensors),
            input=[list(tensor.shape) for tensor in tensors],
        )
    for port, name in zip(model.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    folder.mkdir(parents=True, exist_ok=True)
    openvino.save_model(model, folder / _MODEL, compress_to_fp16=False)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
