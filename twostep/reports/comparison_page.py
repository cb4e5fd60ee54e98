"""A comparison as two pages: tables with grids of pictures, and a blind vote between pairs.

Both are single HTML files that need nothing else and work from a folder. How they look is in
`comparison_page.html` and `vote_page.html`.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image

from twostep.files import write_atomically
from twostep.reports.benchmark import SETS, Pictures
from twostep.reports.comparison import Comparison, strip
from twostep.reports.comparison_table import (
    COST_HEADINGS,
    TITLES,
    columns,
    cost_lines,
    lines,
    notes,
    to_csv,
    to_json,
    to_markdown,
)

NUM_IN_GRID = 12
"""Pictures of each row on the page; the vote page holds more."""


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write table.md, table.csv, table.json, index.html and vote.html; return their paths."""
    written = []
    for name, text in (
        ("table.md", to_markdown(comparison)),
        ("table.csv", to_csv(comparison)),
        ("table.json", to_json(comparison)),
        ("index.html", _page(comparison)),
        ("vote.html", _vote_page(comparison)),
    ):
        with write_atomically(folder / name) as file:
            file.write(text.encode())
        written.append(folder / name)
    return written


def _page(comparison: Comparison) -> str:
    """Return the page of tables and grids."""
    tables = [
        {
            "name": name,
            "title": TITLES[name],
            "columns": columns(comparison, name),
            "lines": lines(comparison, name),
            "prompts": comparison.prompts[name][:NUM_IN_GRID],
            "strips": [
                (each.row.label, _encoded(each.shown[name][:NUM_IN_GRID]))
                for each in comparison.rows
            ],
        }
        for name in SETS
    ]
    return _rendered(
        "comparison_page.html",
        tables=tables,
        cost_headings=COST_HEADINGS,
        cost_lines=cost_lines(comparison),
        notes=notes(comparison),
    )


def _vote_page(comparison: Comparison) -> str:
    """Return the page of the blind vote."""
    data = {
        "rows": [each.row.label for each in comparison.rows],
        "prompts": [prompt for name in SETS for prompt in comparison.prompts[name]],
        "sets": [name for name in SETS for _ in comparison.prompts[name]],
        "side": comparison.rows[0].shown[SETS[0]].shape[-1],
        "strips": [_encoded(*(each.shown[name] for name in SETS)) for each in comparison.rows],
    }
    # In a script, no text may end the element.
    return _rendered("vote_page.html", data=json.dumps(data).replace("</", "<\\/"))


def _encoded(*parts: Pictures) -> str:
    """Return pictures side by side as a PNG in base64."""
    image = Image.fromarray(strip(torch.cat(parts)).numpy())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _rendered(template: str, **values: Any) -> str:
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text).render(**values)
