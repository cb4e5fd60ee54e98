"""A real ComfyUI, for those who have one: its own nodes draw our graphs with a small SDXL.

ComfyUI knows SDXL by its exact sizes. Here its tables of sizes are told those of a model that draws
in a second; nothing of what it computes is touched. What it imports and never calls for pictures
(torchvision, torchaudio, its server) need not be installed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from twostep.contract import Contract
from twostep.media.image import ImageCodec
from twostep.models.bundle import Bundle
from twostep.pretrain.model import random_bundle
from twostep.pretrain.sizes import NANO
from twostep.text.clip import TextEncoders
from twostep.text.vocabulary import clip_tokenizer

from ..vanilla import assemble, write_single_file

WIDTH = 64
VAE_WIDTH = 32
PIXELS = 128

SMALL = replace(
    NANO,
    name="small",
    pixels=PIXELS,
    unet_channels=(32, 64, 128),
    unet_heads=(1, 1, 2),
    unet_layers=2,
    norm_groups=32,
    text_widths=(WIDTH, WIDTH),
    time_id_width=256,
    max_tokens=77,
)
"""An SDXL whose parts have shapes that ComfyUI's classes take: groups of 32, heads of 64."""


def small_bundle() -> Bundle:
    """Return the model, random, with CLIP's vocabulary and an autoencoder of 8 pixels a latent."""
    bundle = random_bundle(0, size=SMALL)
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(VAE_WIDTH, 2 * VAE_WIDTH, 4 * VAE_WIDTH, 4 * VAE_WIDTH),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.13025,
    )
    encoders = (
        CLIPTextModel(_text_config("quick_gelu", pad=49407)),
        CLIPTextModelWithProjection(_text_config("gelu", pad=0)),
    )
    for network in (vae, *encoders):
        network.eval().requires_grad_(False)
    _enlarge(bundle.denoiser.network)
    text = TextEncoders((clip_tokenizer(), clip_tokenizer("!")), encoders, zeros_for_empty=True)
    return replace(bundle, codec=ImageCodec(vae), text=text)


def _enlarge(network: torch.nn.Module) -> None:
    """Let prompts matter: fresh attention adds next to nothing to what it is given."""
    for name, weight in network.named_parameters():
        if re.search(r"attn2\.to_(v|out\.0)\.weight|time_emb_proj\.weight", name):
            weight.data *= 4


def _text_config(activation: str, pad: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=pad,
    )


def write_checkpoint(bundle: Bundle, path: Path, contract: Contract | None = None) -> Path:
    """Write the model into one file, and beside it the configs from which twostep loads it."""
    write_single_file(bundle, path, None if contract is None else contract.to_metadata())
    assemble(bundle, zeros_for_empty=True).save_pretrained(path.with_suffix(""))
    return path


def write_control(bundle: Bundle, path: Path) -> Path:
    """Write a ControlNet of the model that has an effect, by diffusers' names."""
    torch.manual_seed(2)
    control = ControlNetModel.from_unet(bundle.denoiser.network)
    for name, weight in control.named_parameters():
        if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond")):
            torch.nn.init.normal_(weight, std=0.1)
    save_file(control.state_dict(), path)
    config = {**control.config, "_class_name": "ControlNetModel"}
    path.with_suffix(".json").write_text(json.dumps(config, default=str))
    return path


class ComfyUI:
    """Its nodes, and the folders in which they look."""

    def __init__(self, folder: Path, files: Path) -> None:
        sys.path.insert(0, str(folder))
        for name in ("torchvision", "torchvision.transforms", "torchaudio", "server"):
            _be_there(name)
        options = importlib.import_module("comfy.cli_args").args
        vars(options).update(
            cpu=True, fp32_unet=True, fp32_vae=True, fp32_text_enc=True, force_fp32=True
        )
        self.folders = importlib.import_module("folder_paths")
        for name in ("checkpoints", "loras", "controlnet", "diffusion_models"):
            (files / name).mkdir(exist_ok=True)
            self.folders.add_model_folder_path(name, str(files / name), is_default=True)
        (files / "input").mkdir(exist_ok=True)
        self.folders.set_input_directory(str(files / "input"))
        self.version = importlib.import_module("comfyui_version").__version__
        self.nodes = self._all_nodes()
        self._tell_sizes()

    def _all_nodes(self) -> dict[str, Any]:
        nodes: dict[str, Any] = dict(importlib.import_module("nodes").NODE_CLASS_MAPPINGS)
        for name in ("custom_sampler", "mask", "images", "latent", "model_advanced"):
            module = importlib.import_module(f"comfy_extras.nodes_{name}")
            nodes |= getattr(module, "NODE_CLASS_MAPPINGS", {})
            for value in vars(module).values():
                if isinstance(value, type) and "define_schema" in vars(value):
                    nodes[value.define_schema().node_id] = value
        # Younger than some versions; it reads the numbers of a text.
        nodes.setdefault("ManualSigmas", _ManualSigmas)
        return nodes

    def _tell_sizes(self) -> None:
        sdxl = importlib.import_module("comfy.supported_models").SDXL
        sdxl.unet_config = {"use_linear_in_transformer": True, "adm_in_channels": WIDTH + 6 * 256}
        clip = importlib.import_module("comfy.sd1_clip").SDClipModel
        of_clip = clip.__init__

        @functools.wraps(of_clip)
        def small_clip(self: Any, *arguments: Any, **options: Any) -> None:
            is_second = "bigg" in str(options.get("textmodel_json_config"))
            config = _text_config("gelu" if is_second else "quick_gelu", 0 if is_second else 49407)
            options["textmodel_json_config"] = config.to_dict()
            options["model_options"] = {
                **options.get("model_options", {}),
                "model_name": "clip_g" if is_second else "clip_l",
            }
            of_clip(self, *arguments, **options)

        clip.__init__ = small_clip
        for name in ("Encoder", "Decoder"):
            part = getattr(
                importlib.import_module("comfy.ldm.modules.diffusionmodules.model"), name
            )
            part.__init__ = functools.partialmethod(_narrow, part.__init__)
        detection = importlib.import_module("comfy.model_detection")
        of_unet = detection.unet_config_from_diffusers_unet

        def known_unet(weights: Any, dtype: Any = None) -> Any:
            return of_unet(weights, dtype) or {**self.unet_config}

        detection.unet_config_from_diffusers_unet = known_unet

    def run(self, graph: dict[str, Any]) -> dict[str, Any]:
        """Execute a graph; returns the outputs of every node, and under "image" what is saved."""
        done: dict[str, Any] = {}
        for name in sorted(graph, key=int):
            node = graph[name]
            inputs = {
                key: done[value[0]][value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            }
            if node["class_type"] == "SaveImage":
                done["image"] = inputs["images"]
                continue
            done[name] = self._execute(node["class_type"], inputs)
            if node["class_type"] in ("CheckpointLoaderSimple", "UNETLoader"):
                self.unet_config = done[name][0].model.model_config.unet_config
        return done

    def _execute(self, kind: str, inputs: dict[str, Any]) -> Any:
        node = self.nodes[kind]
        with torch.inference_mode():
            if hasattr(node, "execute") and hasattr(node, "define_schema"):
                return node.execute(**inputs).args
            return getattr(node(), node.FUNCTION)(**inputs)


class _ManualSigmas:
    FUNCTION = "read"

    def read(self, sigmas: str) -> tuple[torch.Tensor]:
        """Return the numbers of a text, without exponents, as ComfyUI reads them."""
        return (torch.FloatTensor([float(each) for each in re.findall(r"[-+]?\d*\.*\d+", sigmas)]),)


def _narrow(self: Any, original: Any, *arguments: Any, **options: Any) -> None:
    original(self, *arguments, **{**options, "ch": VAE_WIDTH})


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _Anything()


class _Absent(ModuleType):
    """A module that is imported for other things than pictures."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


def _be_there(name: str) -> None:
    module = _Absent(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    sys.modules.setdefault(name, module)
