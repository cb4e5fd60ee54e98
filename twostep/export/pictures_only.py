"""What is for models of pictures alone, and what is done with models of other media instead."""

from twostep.contract import Contract
from twostep.formats.checkpoint import Checkpoint
from twostep.formats.locate import ModelError

_INSTEAD = {
    "video": (
        "Export it to diffusers; the motion modules in it and in `students` are those that "
        "diffusers' MotionAdapter and AnimateDiff-Evolved in ComfyUI load as they are. LoRAs on "
        "them go to lora-animatediff."
    ),
    "audio": (
        "Export it to diffusers, which writes the folder of its own family; `twostep generate` and "
        "`twostep serve` play it."
    ),
}
"""What to do with a model of another medium."""

_OTHERWISE = "Export it to diffusers, which writes the folder of its own family."


def check_is_of_pictures(checkpoint: Checkpoint, what: str) -> None:
    """Refuse the file or folder of a model of another medium, as `check_makes_pictures` does.

    A file that carries no contract is let through: what it is says its own form.
    """
    contract = checkpoint.contract if checkpoint.is_folder else checkpoint.carried
    if contract is not None:
        check_makes_pictures(contract, what)


def check_makes_pictures(contract: Contract, what: str) -> None:
    """Refuse a model of another medium where nothing but pictures can be.

    Args:
        contract: of the model.
        what: a form of file, or something that is done, in the plural: "comfyui files".

    Raises ModelError with the medium and what to do instead.
    """
    if contract.media != "image":
        instead = _INSTEAD.get(contract.media, _OTHERWISE)
        raise ModelError(
            f"{contract.name} makes {contract.things}, and {what} are for models of pictures "
            f"alone. {instead}"
        )
