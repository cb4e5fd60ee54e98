"""Workflows as ComfyUI's page has them. Nothing here needs torch: pictures are saved with them."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

HERE = Path(__file__).parent


def page_of(api: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow for ComfyUI's server as its page has it; it has the nodes of nodes.json."""
    known = _known_nodes()
    values = {"api": api, "known": known, "links": _links(api, known)}
    page: dict[str, Any] = json.loads(rendered("page.json", values))
    return page


def rendered(template: str, values: Mapping[str, object]) -> str:
    """Return a template of this folder, filled."""
    return _compiled(template).render(values)


@cache
def _known_nodes() -> dict[str, Any]:
    """Return what nodes.json says; it is changed by nobody."""
    nodes: dict[str, Any] = json.loads((HERE / "nodes.json").read_text(encoding="utf-8"))
    return nodes


@cache
def _compiled(template: str) -> Template:
    """Return a template of this folder. Compiling takes longer than drawing a small picture."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((HERE / template).read_text(encoding="utf-8"))


def _links(api: dict[str, Any], known: dict[str, Any]) -> list[tuple[object, ...]]:
    """List the links of a workflow as the page counts them.

    Each is: number, node and output that it comes from, node and input that it goes to, type.
    """
    links: list[tuple[object, ...]] = []
    for name, node in api.items():
        for place, each in enumerate(known[node["class_type"]]["inputs"]):
            start, output = node["inputs"][each]
            kind = known[api[start]["class_type"]]["outputs"][output]
            links.append((len(links) + 1, int(start), output, int(name), place, kind))
    return links
