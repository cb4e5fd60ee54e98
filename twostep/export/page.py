"""Workflows as ComfyUI's page has them. Pictures are saved with them: nothing heavy is loaded."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_COLUMN, _ROW = 400, 280
"""How far nodes are apart on the page, in pixels; there are two rows."""


class _Link(NamedTuple):
    """What goes from an output of one node to an input of another, as the page lists them."""

    number: int
    start: int
    output: int
    end: int
    place: int
    kind: str


def page_of(api: dict[str, Any]) -> dict[str, Any]:
    """Return a workflow for ComfyUI's server as its page has it; it has the nodes of nodes.json."""
    links = _links(api)
    return {
        "last_node_id": max(map(int, api)),
        "last_link_id": len(links),
        "nodes": [_node(place, int(id), api[id], links) for place, id in enumerate(api)],
        "links": [list(link) for link in links],
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _node(place: int, id: int, node: Mapping[str, Any], links: list[_Link]) -> dict[str, Any]:
    """Return a node of the page, where it stands among the others."""
    kind = _known_nodes()[node["class_type"]]
    coming = {link.place: link for link in links if link.end == id}
    leaving = [link for link in links if link.start == id]
    return {
        "id": id,
        "type": node["class_type"],
        "order": place,
        "mode": 0,
        "flags": {},
        "pos": [60 + _COLUMN * (place // 2), 60 + _ROW * (place % 2)],
        "size": [340, 200],
        "properties": {"Node name for S&R": node["class_type"]},
        "inputs": [
            {"name": name, "type": coming[number].kind, "link": coming[number].number}
            for number, name in enumerate(kind["inputs"])
        ],
        "outputs": [
            {
                "name": kind.get("names", kind["outputs"])[number],
                "type": each,
                "links": [link.number for link in leaving if link.output == number],
            }
            for number, each in enumerate(kind["outputs"])
        ],
        # What a node does not say, such as "fixed" after a seed, stands for itself.
        "widgets_values": [node["inputs"].get(each, each) for each in kind["widgets"]],
    }


def _links(api: Mapping[str, Any]) -> list[_Link]:
    """List the links of a workflow, in the order of its nodes and of their inputs."""
    known = _known_nodes()
    links: list[_Link] = []
    for name, node in api.items():
        for place, each in enumerate(known[node["class_type"]]["inputs"]):
            start, output = node["inputs"][each]
            kind = known[api[start]["class_type"]]["outputs"][output]
            links.append(_Link(len(links) + 1, int(start), output, int(name), place, kind))
    return links


@cache
def _known_nodes() -> dict[str, Any]:
    """Return what nodes.json says; it is changed by nobody."""
    path = Path(__file__).with_name("nodes.json")
    nodes: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return nodes
