"""What of ComfyUI our nodes touch, written anew for the tests: the V3 interface, its folders,
loaders and sampling.

It is as strict as the original where that is strict (ids, inputs, what may be returned), and its
loaders load, so that a model can be sampled here as ComfyUI's SamplerCustom would.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from twostep.formats.lora_files import merge_lora, read_lora
from twostep.models.loading import load_bundle

FOLDERS: dict[str, Path] = {}
"""ComfyUI's model folders by name, set by a test."""

CALLS: list[tuple[Any, ...]] = []
"""What the loaders were asked."""


@dataclass
class Socket:
    """An input or output of a node: its type, its id, and what else is said of it."""

    type: str
    id: str | None
    options: dict[str, Any]


def _input(type_: str, allowed: set[str]) -> Any:
    def make(id: str, **options: Any) -> Socket:
        assert isinstance(id, str) and id.isidentifier(), id
        assert options.keys() <= allowed | {"display_name", "optional", "tooltip", "lazy"}, options
        return Socket(type_, id, options)

    return make


def _type(type_: str, allowed: tuple[str, ...] = ()) -> SimpleNamespace:
    def output(id: str | None = None, **options: Any) -> Socket:
        assert options.keys() <= {"display_name", "tooltip", "is_output_list"}, options
        return Socket(type_, id, options)

    return SimpleNamespace(Input=_input(type_, set(allowed)), Output=output)


@dataclass
class Schema:
    """A node's description; `check` is what ComfyUI refuses at the start."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Socket] = field(default_factory=list)
    outputs: list[Socket] = field(default_factory=list)
    description: str = ""
    is_output_node: bool = False

    def check(self) -> None:
        ids = [socket.id for socket in (*self.inputs, *self.outputs)]
        assert len(set(ids)) == len(ids), f"ids of {self.node_id} are not unique: {ids}"
        for socket in self.inputs:
            if socket.type == "COMBO":
                assert isinstance(socket.options["options"], list)
            if socket.type in ("INT", "FLOAT"):
                assert socket.options["min"] <= socket.options["default"] <= socket.options["max"]


class NodeOutput:
    """What a node gives back."""

    def __init__(self, *args: Any, ui: dict[str, Any] | None = None) -> None:
        self.args, self.ui = args, ui


class ComfyNode:
    """The class that all nodes derive from."""

    @classmethod
    def object_info(cls) -> dict[str, Any]:
        """Describe the node as ComfyUI's /object_info does."""
        schema = cls.define_schema()  # type: ignore[attr-defined]
        schema.check()
        required = {
            i.id: [i.type, {k: v for k, v in i.options.items() if k != "tooltip"}]
            for i in schema.inputs
        }
        return {
            "input": {"required": required},
            "output": [output.type for output in schema.outputs],
            "output_name": [
                output.options.get("display_name", output.type) for output in schema.outputs
            ],
            "output_node": schema.is_output_node,
        }

    @classmethod
    def run(cls, **inputs: Any) -> NodeOutput:
        """Execute the node as the server does: every input by its name, and as many outputs as were
        promised.
        """
        schema = cls.define_schema()  # type: ignore[attr-defined]
        for name in ("execute", "fingerprint_inputs"):
            taken = list(inspect.signature(getattr(cls, name)).parameters)
            assert taken == [socket.id for socket in schema.inputs], (
                f"{name} of {cls.__name__} takes {taken}"
            )
        answer = cls.execute(**inputs)  # type: ignore[attr-defined]
        assert isinstance(answer, NodeOutput) and len(answer.args) == len(schema.outputs)
        return answer


class ComfyExtension:
    """What `comfy_entrypoint` gives an instance of."""


class Model:
    """A loaded network with its sampling, which patches of objects replace on a clone."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.model = SimpleNamespace(
            network=network, model_config=SimpleNamespace(sampling_settings={})
        )
        self.patches: dict[str, Any] = {}

    def clone(self) -> Model:
        twin = copy.copy(self)
        twin.patches = dict(self.patches)
        return twin

    def add_object_patch(self, name: str, value: Any) -> None:
        self.patches[name] = value


class Steps(torch.nn.Module):
    """The discrete schedule: sigma / alpha at every index, and the index of a sigma, by the nearest
    logarithm.
    """

    def __init__(self, model_config: Any = None, zsnr: bool | None = None) -> None:
        super().__init__()
        assert model_config is not None and not zsnr
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, 0)
        self.sigmas = ((1 - kept) / kept).sqrt().float()

    def index(self, sigma: Tensor) -> Tensor:
        return (sigma.log() - self.sigmas.log()).abs().argmin()


class Eps:
    """A network that predicts the noise: x = x0 + sigma eps, fed with x / sqrt(1 + sigma^2)."""

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x - sigma * output


class X0(Eps):
    """A network that predicts the picture."""

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return output


class V(Eps):
    """A network that predicts v = alpha eps - sigma x0, in the coordinates of unit variance."""

    def denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        return x / (1 + sigma**2) - output * sigma / (1 + sigma**2).sqrt()


def sampler_custom(model: Model, noise: Tensor, sigmas: Tensor, feed: Any) -> Tensor:
    """Follow the flow as SamplerCustom does with Euler: from pure noise where the first sigma is
    the largest.
    """
    sampling = model.patches["model_sampling"]
    assert math.isclose(sampling.sigmas[-1], sigmas[0], rel_tol=1e-5), (
        "it would not start from pure noise"
    )
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    for sigma, after in pairwise(sigmas):
        output = feed(model.model.network, x / (1 + sigma**2).sqrt(), sampling.index(sigma))
        x0 = sampling.denoised(sigma, output, x)
        x = x + (x - x0) / sigma * (after - sigma)
    return x


def _load_checkpoint(
    path: str, *, output_vae: bool, output_clip: bool, embedding_directory: Any, output_model: bool
):
    CALLS.append(("checkpoint", Path(path).name, output_model))
    bundle = load_bundle(path)
    return Model(bundle.denoiser.network) if output_model else None, bundle.text, bundle.codec, None


def _load_unet(path: str) -> Model:
    CALLS.append(("unet", Path(path).name))
    return Model(load_bundle(path).denoiser.network)


def _load_lora(
    model: Model, clip: Any, weights: dict[str, Tensor], on_model: float, on_clip: float
):
    (path,) = (entry[1] for entry in CALLS if entry[0] == "lora")
    CALLS.append(("strength", on_model, on_clip))
    twin = Model(copy.deepcopy(model.model.network))
    parts = {"unet": twin.model.network}
    merge_lora(read_lora(path, parts), parts, weight=on_model)
    return twin, clip


def _load_weights(path: str, safe_load: bool) -> dict[str, Tensor]:
    assert safe_load
    CALLS.append(("lora", Path(path)))
    return load_file(path)


def modules() -> dict[str, ModuleType]:
    """Return the modules by name, for `sys.modules`."""
    widget = ("default", "min", "max", "step", "options", "multiline", "control_after_generate")
    names = {
        "Model": "MODEL",
        "Clip": "CLIP",
        "Vae": "VAE",
        "Sigmas": "SIGMAS",
        "Int": "INT",
        "Float": "FLOAT",
    }
    types = {
        name: _type(type_, widget)
        for name, type_ in (names | {"String": "STRING", "Combo": "COMBO"}).items()
    }
    io = SimpleNamespace(Schema=Schema, NodeOutput=NodeOutput, ComfyNode=ComfyNode, **types)
    contents: dict[str, dict[str, Any]] = {
        "comfy": {"__path__": []},
        "comfy.sd": {
            "load_checkpoint_guess_config": _load_checkpoint,
            "load_diffusion_model": _load_unet,
            "load_lora_for_models": _load_lora,
        },
        "comfy.utils": {"load_torch_file": _load_weights},
        "comfy.model_sampling": {
            "ModelSamplingDiscrete": Steps,
            "EPS": Eps,
            "X0": X0,
            "V_PREDICTION": V,
        },
        "folder_paths": {
            "get_filename_list": lambda folder: sorted(
                path.name for path in FOLDERS[folder].glob("*")
            ),
            "get_full_path_or_raise": lambda folder, name: str(
                (FOLDERS[folder] / name).resolve(strict=True)
            ),
            "get_folder_paths": lambda folder: [str(FOLDERS[folder])] if folder in FOLDERS else [],
        },
        "comfy_api": {"__path__": []},
        "comfy_api.latest": {"ComfyExtension": ComfyExtension, "io": io},
    }
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        made[name].__dict__.update(content)
    for name in made:
        if "." in name:
            setattr(made[name.rpartition(".")[0]], name.rpartition(".")[2], made[name])
    return made


def install(monkeypatch: Any) -> None:
    """Let ComfyUI be there for one test."""
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "comfyui.nodes", raising=False)
    CALLS.clear()
    FOLDERS.clear()
