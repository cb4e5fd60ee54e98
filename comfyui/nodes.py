"""The nodes: a loader, a switch between students, and an inspector.

They put what `sampling` knows into ComfyUI's terms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import ComfyExtension, io

from twostep.contract import Contract, VariancePreservingSpec
from twostep.formats import resolve

from .sampling import FOLDERS, PREDICTIONS, explain, kind_of, read_contract, sigmas, student_beside

NO_BASE = "none"
CATEGORY = "loaders/twostep"


class TwostepLoader(io.ComfyNode):
    """Loads a checkpoint, a UNet or a LoRA, and hands out how it is to be sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="TwostepLoader",
            display_name="Twostep Loader",
            category=CATEGORY,
            description=(
                "Reads the sampling contract of a checkpoint, UNet or LoRA: the model predicts "
                "what it was trained to predict, and sigmas, steps and cfg are the ones it was "
                "made for."
            ),
            inputs=[_file_input(), _base_input(), _strength_input()],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, file: str, base: str, strength: float) -> io.NodeOutput:
        """Load the file."""
        return io.NodeOutput(*_load(_path(file), base, strength))

    @classmethod
    def fingerprint_inputs(cls, file: str, base: str, strength: float) -> object:
        """Load again when a file was written anew under the same name."""
        return _stamp(_path(file)), base, strength


class TwostepStudentSwitch(io.ComfyNode):
    """Loads the student of so many steps that lies beside a given one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="TwostepStudentSwitch",
            display_name="Twostep Student Switch",
            category=CATEGORY,
            description=(
                "Give any student of a family and the steps you want: the one that was trained "
                "for these is found beside it by its contract."
            ),
            inputs=[
                _file_input(),
                io.Int.Input(
                    "steps", default=2, min=1, max=1000, tooltip="8, 4, 2 or 1 for SDXL-Lightning."
                ),
                _base_input(),
                _strength_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, file: str, steps: int, base: str, strength: float) -> io.NodeOutput:
        """Find the student and load it."""
        return io.NodeOutput(*_load(student_beside(_path(file), steps), base, strength))

    @classmethod
    def fingerprint_inputs(cls, file: str, steps: int, base: str, strength: float) -> object:
        """Look again when a student was added to the folder, or written anew."""
        beside = _path(file).parent.glob("*.safetensors")
        return tuple(_stamp(path) for path in beside), steps, base, strength


class TwostepContract(io.ComfyNode):
    """Says what a file is and how it is to be sampled, without loading any weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="TwostepContract",
            display_name="Twostep Contract",
            category=CATEGORY,
            description=(
                "Tells what a checkpoint, UNet or LoRA says of itself: steps, prediction, sizes, "
                "recipe."
            ),
            inputs=[_file_input()],
            outputs=[io.String.Output("contract", display_name="contract")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        """Read the contract."""
        explanation = explain(_path(file))
        return io.NodeOutput(explanation, ui={"text": (explanation,)})

    @classmethod
    def fingerprint_inputs(cls, file: str) -> object:
        """Read again when the file was written anew."""
        return _stamp(_path(file))


class TwostepExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the nodes."""
        return [TwostepLoader, TwostepStudentSwitch, TwostepContract]


def _file_input() -> io.Combo.Input:
    """Return the choice among all files of ComfyUI's model folders, as "folder/name"."""
    files = []
    for folder in FOLDERS:
        for name in folder_paths.get_filename_list(folder):
            if name.endswith(".safetensors"):
                files.append(f"{folder}/{name}")
    return io.Combo.Input("file", options=files, tooltip="A checkpoint, a UNet alone, or a LoRA.")


def _base_input() -> io.Combo.Input:
    """Return the choice among whole checkpoints, or none."""
    checkpoints = folder_paths.get_filename_list("checkpoints")
    names = [name for name in checkpoints if name.endswith(".safetensors")]
    return io.Combo.Input(
        "base",
        options=[NO_BASE, *names],
        default=NO_BASE,
        tooltip=(
            "The checkpoint that a LoRA goes on, and that lends a UNet its text encoders and VAE."
        ),
    )


def _strength_input() -> io.Float.Input:
    return io.Float.Input(
        "strength", default=1.0, min=0.0, max=2.0, step=0.05, tooltip="How strongly a LoRA goes on."
    )


def _outputs() -> list[io.Output]:
    return [
        io.Model.Output("model", display_name="MODEL"),
        io.Clip.Output("clip", display_name="CLIP", tooltip="Empty for a UNet without a base."),
        io.Vae.Output("vae", display_name="VAE", tooltip="Empty for a UNet without a base."),
        io.Sigmas.Output(
            "sigmas", display_name="SIGMAS", tooltip="For SamplerCustom: the exact trained times."
        ),
        io.Int.Output(
            "num_steps", display_name="steps", tooltip="For KSampler, with the scheduler simple."
        ),
        io.Float.Output(
            "cfg", display_name="cfg", tooltip="1 for a student: guidance is distilled into it."
        ),
    ]


def _path(file: str) -> Path:
    """Return where a file lies that was chosen as "folder/name"."""
    folder, _, name = file.partition("/")
    return Path(folder_paths.get_full_path_or_raise(folder, name))


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return what changes when a file is written anew."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def _load(path: Path, base: str, strength: float) -> tuple[Any, ...]:
    """Return model, text encoders, VAE, sigmas, steps and cfg of a file."""
    checkpoint = resolve(path)
    kind = kind_of(checkpoint)
    base_path = None if base == NO_BASE else _path(f"checkpoints/{base}")
    contract = read_contract(checkpoint, base_path)
    steps_of_noise = sigmas(contract)
    model = clip = vae = None
    whole = path if kind == "checkpoint" else base_path
    if whole is not None:
        model, clip, vae = _checkpoint(whole, with_model=kind != "unet")
    if kind == "unet":
        model = comfy.sd.load_diffusion_model(str(path))
    elif kind == "lora":
        weights = comfy.utils.load_torch_file(str(path), safe_load=True)
        model, clip = comfy.sd.load_lora_for_models(model, clip, weights, strength, strength)
    return (
        _sampled(model, contract),
        clip,
        vae,
        steps_of_noise,
        contract.steps,
        contract.guidance,
    )


def _checkpoint(path: Path, *, with_model: bool) -> tuple[Any, ...]:
    """Let ComfyUI load model, text encoders and VAE of a whole checkpoint."""
    return comfy.sd.load_checkpoint_guess_config(
        str(path),
        output_vae=True,
        output_clip=True,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        output_model=with_model,
    )[:3]


def _sampled(model: Any, contract: Contract) -> Any:
    """Return the model with the answers of its network read as what they are."""
    schedule = comfy.model_sampling.ModelSamplingDiscrete
    reading = getattr(comfy.model_sampling, PREDICTIONS[contract.prediction_type])
    sampling = type("ContractSampling", (schedule, reading), {})
    model = model.clone()
    zero_snr = isinstance(contract.schedule, VariancePreservingSpec) and contract.schedule.zero_snr
    model.add_object_patch("model_sampling", sampling(model.model.model_config, zsnr=zero_snr))
    return model
