"""What lies beside an exported model: a card for a person, and workflows for ComfyUI.

The texts are the templates card.md and workflow.json; nodes.json says what ComfyUI's page needs to
know of its nodes.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from twostep.contract import Contract, VariancePreservingSpec
from twostep.diffusion import make_schedule, noise_levels
from twostep.diffusion.grid import floored_times
from twostep.export.page import page_of
from twostep.files import write_atomically
from twostep.formats.contracts import SDXL
from twostep.formats.locate import SDXL_BASE, ModelError, read_json
from twostep.media.pictures import UnusablePictureError, open_picture
from twostep.models.sampling import sampling_times
from twostep.models.sdxl import is_sdxl
from twostep.training.recipe import RECIPES

_TASKS = {"image": "text-to-image", "video": "text-to-video", "audio": "text-to-audio"}
"""What the hub calls that which models of a medium do."""


@dataclass(frozen=True)
class Card:
    """What a card shows beside the contract.

    `picture` is what the model draws, `evaluation` a JSON file with figures, and `license` the
    hub's name of the licence.
    """

    picture: Path | None = None
    evaluation: Path | None = None
    license: str | None = None

    def write(
        self,
        contract: Contract,
        to: str,
        out: Path,
        *,
        full_size: bool,
        name: str | None = None,
    ) -> None:
        """Write README.md into a folder, or a .md beside a file, with the picture.

        Arguments:
            contract: what the model says of itself.
            to: the form that it was exported to, as `writing.TARGETS`.
            out: the exported folder or file.
            full_size: whether the model is SDXL itself, and no smaller one of its classes.
            name: what the export will be called, if not as now.

        Raises ModelError for a picture or figures that cannot be read.
        """
        card = out / "README.md" if out.is_dir() else out.with_suffix(".md")
        shown = card.with_name("grid.png") if out.is_dir() else out.with_suffix(".png")
        if self.picture is not None:
            _copy_picture(self.picture, shown)
        base = SDXL_BASE if contract.base == SDXL.base else contract.base
        default_license = "openrail++" if base == SDXL_BASE else "other"
        recipe = RECIPES / f"{contract.recipe}.toml"
        _render(
            "card.md",
            card,
            file=name or out.name,
            to=to,
            contract=contract,
            workflow_steps=workflow_steps(contract),
            has_levels=workflow_levels(contract) is not None,
            fields=_fields(contract),
            sampling=sampler_in_words(contract),
            renoises=contract.sampler == "renoise",
            timesteps=timesteps(contract),
            full_size=full_size,
            sdxl=is_sdxl(contract),
            task=_TASKS.get(contract.media, f"text-to-{contract.media}"),
            is_of_pictures=contract.media == "image",
            base=base,
            license=self.license or default_license,
            recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else "",
            rows=self._figures(),
            picture=shown.name if self.picture is not None else None,
        )

    def _figures(self) -> list[dict[str, Any]]:
        """Read the evaluation as the rows of a table; none without one."""
        if self.evaluation is None:
            return []
        problem = ModelError(
            f"{self.evaluation} is no table: expected a JSON object, or a list of them with equal "
            "keys."
        )
        try:
            read = json.loads(self.evaluation.read_bytes())
        except (OSError, ValueError) as error:
            raise problem from error
        rows = read if isinstance(read, list) else [read]
        for row in rows:
            if not isinstance(row, dict) or row.keys() != rows[0].keys():
                raise problem
        return rows


def timesteps(contract: Contract) -> list[int]:
    """Return the times that a model visits as diffusers counts them, from 0 and falling.

    Those of a rectified flow are no whole numbers: of such a model none.
    """
    if not isinstance(contract.schedule, VariancePreservingSpec):
        return []
    schedule = make_schedule(**asdict(contract.schedule))
    return [int(t) - 1 for t in sampling_times(contract, schedule)[:-1]]


def sampler_in_words(contract: Contract) -> str:
    """Return how a model is sampled, in the words of other programs."""
    if contract.sampler == "renoise":
        times = ", ".join(map(str, timesteps(contract)))
        return "LCM (x0, then fresh noise)" + (f" at the timesteps {times}" if times else "")
    return "Euler, trailing times ('simple')"


def _fields(contract: Contract) -> dict[str, Any]:
    """Return the contract's values by their names, without what it does not say."""
    values = {field.name: getattr(contract, field.name) for field in fields(contract)}
    if not contract.sampling_times:
        del values["sampling_times"]
    return values


def _copy_picture(picture: Path, out: Path) -> None:
    try:
        pixels = open_picture(picture.read_bytes)
    except (OSError, UnusablePictureError) as error:
        raise ModelError(f"{picture} is no picture ({error}).") from error
    with write_atomically(out) as file:
        pixels.save(file, format="PNG")


def write_workflows(contract: Contract, to: str, out: Path) -> None:
    """Write how ComfyUI draws with an exported file.

    For X.safetensors these are X.json, to be opened on ComfyUI's page, and X.api.json, to be sent
    to its server.
    """
    api_path = out.with_suffix(".api.json")
    _render(
        "workflow.json",
        api_path,
        file=out.name,
        to=to,
        contract=contract,
        steps=workflow_steps(contract),
        levels=workflow_levels(contract),
        name=out.stem,
    )
    page = json.dumps(page_of(read_json(api_path)), indent=2)
    with write_atomically(out.with_suffix(".json")) as file:
        file.write(page.encode())


def workflow_steps(contract: Contract) -> int:
    """Return the number of steps that a workflow takes.

    ComfyUI's scheduler `simple` rounds times another way than the trailing grid, so that the two
    agree only where all times are whole. A teacher may take any number of steps: its workflow takes
    the next one that divides its times. A student keeps to its own.
    """
    steps = contract.steps
    schedule = contract.schedule
    if contract.role == "teacher" and isinstance(schedule, VariancePreservingSpec):
        while schedule.num_times % steps:
            steps += 1
    return steps


def workflow_levels(contract: Contract) -> str | None:
    """Return the noise levels of a student whose times `simple` misses, as ComfyUI reads them.

    None where `simple` visits the times that the student was trained at, and for other laws of
    noise than those of whole times.
    """
    spec = contract.schedule
    if contract.role == "teacher" or not isinstance(spec, VariancePreservingSpec):
        return None
    schedule = make_schedule(**asdict(spec))
    times = sampling_times(contract, schedule)
    if times[:-1] == floored_times(contract.steps, spec.num_times):
        return None
    return ", ".join(f"{level:.9f}" for level in noise_levels(schedule, times))


def _render(template: str, out: Path, **values: object) -> None:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = Path(__file__).with_name(template).read_text(encoding="utf-8")
    text = environment.from_string(source).render(values)
    with write_atomically(out) as file:
        file.write(text.encode())
