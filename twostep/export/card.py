"""What lies beside an exported model: a card for a person, pictures that it drew, and workflows for ComfyUI.

The texts are templates, card.md and workflow.json; nodes.json says of ComfyUI's nodes what their pages need.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image, UnidentifiedImageError

from twostep.contract import Contract
from twostep.diffusion import initial_noise, sample
from twostep.models.bundle import Bundle
from twostep.models.codec import to_images
from twostep.models.contact_sheet import contact_sheet
from twostep.models.folder import ModelError, read_json
from twostep.models.official import BASE
from twostep.models.single_file import SDXL_BASE
from twostep.runs.folder import write_whole
from twostep.runs.recipe import RECIPES

HERE = Path(__file__).parent
_IMAGES_PER_PROMPT = 4


@dataclass(frozen=True)
class Card:
    """What a card shows beside the contract: pictures of these prompts, or a given one; figures (JSON); the licence."""

    prompts: Sequence[str] = ()
    picture: Path | None = None
    evaluation: Path | None = None
    license: str | None = None

    def write(self, bundle: Bundle, contract: Contract, to: str, out: Path) -> None:
        """Write the card: README.md into a folder, else a .md beside the file; ModelError for what cannot be shown."""
        card, shown = (out / "README.md", out / "grid.png") if out.is_dir() else (out.with_suffix(x) for x in _ENDS)
        picture = self._picture(bundle, contract)
        if picture is not None:
            picture.convert("RGB").save(shown)
        recipe = RECIPES / f"{contract.recipe}.toml"
        base = SDXL_BASE if contract.base == BASE else contract.base
        _render(
            "card.md",
            card,
            file=out.name,
            to=to,
            contract=contract,
            fields={name.replace("_", " "): value for name, value in asdict(contract).items()},
            license=self.license or ("openrail++" if base == SDXL_BASE else "other"),
            base=base,
            full_size=is_full_size(bundle),
            recipe=recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else "",
            rows=self._figures(),
            picture=shown.name if picture else "",
        )

    def _figures(self) -> list[dict[str, Any]]:
        if self.evaluation is None:
            return []
        try:
            read = json.loads(self.evaluation.read_text(encoding="utf-8"))
            rows: list[dict[str, Any]] = read if isinstance(read, list) else [read]
            if all(row.keys() == rows[0].keys() for row in rows):
                return rows
        except (OSError, ValueError, AttributeError):
            pass
        raise ModelError(f"{self.evaluation} is no table: expected a JSON object, or a list of them with equal keys.")

    @torch.inference_mode()
    def _picture(self, bundle: Bundle, contract: Contract) -> Image.Image | None:
        if self.picture is not None:
            try:
                return Image.open(self.picture)
            except (OSError, UnidentifiedImageError) as error:
                raise ModelError(f"{self.picture} is no picture ({error}).") from error
        width, height = contract.sizes[0]
        shape, number = bundle.latent_shape(width, height), _IMAGES_PER_PROMPT
        noise = torch.stack([initial_noise(seed, shape) for seed in range(number)])
        rows = []
        for prompt in self.prompts:
            told = bundle.conditioning([prompt, ""], width, height)
            denoise = bundle.denoiser.guided(told[:1].expand(number), told[1:].expand(number), contract.guidance)
            latents = sample(denoise, noise, contract.steps, bundle.denoiser.schedule)
            rows.append((prompt, to_images(bundle.codec.decode(latents))))
        return contact_sheet(rows) if rows else None


_ENDS = (".md", ".png")


def is_full_size(bundle: Bundle) -> bool:
    """Tell SDXL itself from smaller models of its classes, which most programs do not know."""
    return tuple(bundle.denoiser.network.config.block_out_channels) == (320, 640, 1280)


def write_workflows(contract: Contract, to: str, out: Path) -> None:
    """Write for a file how ComfyUI draws with it: X.json to open on its page, X.api.json to send to its server."""
    api_path = out.with_suffix(".api.json")
    _render("workflow.json", api_path, file=out.name, to=to, contract=contract, name=out.stem)
    api, known = read_json(api_path), read_json(HERE / "nodes.json")
    _render("page.json", out.with_suffix(".json"), api=api, known=known, links=_links(api, known))


def _links(api: dict[str, Any], known: dict[str, Any]) -> list[list[Any]]:
    """Number the links of a workflow: number, node and output it comes from, node and input it goes to, type."""
    links: list[list[Any]] = []
    for name, node in api.items():
        for place, each in enumerate(known[node["class_type"]]["inputs"]):
            start, output = node["inputs"][each]
            kind = known[api[start]["class_type"]]["outputs"][output]
            links.append([len(links) + 1, int(start), output, int(name), place, kind])
    return links


def _render(template: str, out: Path, **values: object) -> None:
    page = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        (HERE / template).read_text(encoding="utf-8")
    )
    with write_whole(out) as file:
        file.write(page.render(**values).encode())
