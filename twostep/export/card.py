"""What lies beside an exported model: a card for a person, and workflows for ComfyUI.

The texts are templates, card.md and workflow.json; nodes.json says of ComfyUI's nodes what their
pages need.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from twostep.contract import Contract
from twostep.files import write_atomically
from twostep.formats.locate import ModelError, read_json
from twostep.formats.single_file import SDXL_BASE
from twostep.models.contracts import SDXL
from twostep.training.recipe import RECIPES

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """What a card shows beside the contract: a picture, figures (JSON), and the hub's name of the
    licence.
    """

    picture: Path | None = None
    evaluation: Path | None = None
    license: str | None = None

    def write(self, contract: Contract, to: str, out: Path, *, full_size: bool) -> None:
        """Write README.md into a folder, else a .md beside a file; ModelError for what cannot be
        shown.
        """
        card = out / "README.md" if out.is_dir() else out.with_suffix(".md")
        shown = card.with_name("grid.png") if out.is_dir() else out.with_suffix(".png")
        if self.picture is not None:
            try:
                Image.open(self.picture).convert("RGB").save(shown)
            except OSError as error:
                raise ModelError(f"{self.picture} is no picture ({error}).") from error
        recipe = RECIPES / f"{contract.recipe}.toml"
        told = {
            "file": out.name,
            "to": to,
            "contract": contract,
            "fields": asdict(contract),
            "full_size": full_size,
        }
        told["base"] = base = SDXL_BASE if contract.base == SDXL.base else contract.base
        told["license"] = self.license or ("openrail++" if base == SDXL_BASE else "other")
        told["recipe"] = recipe.read_text(encoding="utf-8").strip() if recipe.is_file() else ""
        _render("card.md", card, rows=self._figures(), picture=self.picture and shown.name, **told)

    def _figures(self) -> list[dict[str, Any]]:
        try:
            read = (
                json.loads(self.evaluation.read_text(encoding="utf-8")) if self.evaluation else []
            )
            rows: list[dict[str, Any]] = read if isinstance(read, list) else [read]
            if all(row.keys() == rows[0].keys() for row in rows):
                return rows
        except (OSError, ValueError, AttributeError):
            pass
        raise ModelError(
            f"{self.evaluation} is no table: expected a JSON object, or a list of them with equal keys."
        )


def write_workflows(contract: Contract, to: str, out: Path) -> None:
    """Write for a file how ComfyUI draws with it: X.json to open on its page, X.api.json to send to
    its server.
    """
    api_path = out.with_suffix(".api.json")
    _render("workflow.json", api_path, file=out.name, to=to, contract=contract, name=out.stem)
    api, known = read_json(api_path), read_json(HERE / "nodes.json")
    # number, node and output it comes from, node and input it goes to, type
    links: list[tuple[object, ...]] = []
    for name, node in api.items():
        for place, each in enumerate(known[node["class_type"]]["inputs"]):
            start, output = node["inputs"][each]
            kind = known[api[start]["class_type"]]["outputs"][output]
            links.append((len(links) + 1, int(start), output, int(name), place, kind))
    _render("page.json", out.with_suffix(".json"), api=api, known=known, links=links)


def _render(template: str, out: Path, **values: object) -> None:
    made = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = made.from_string((HERE / template).read_text(encoding="utf-8")).render(**values)
    with write_atomically(out) as file:
        file.write(text.encode())
