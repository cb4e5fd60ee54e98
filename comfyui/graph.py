"""Workflows: checked against node definitions, and laid out for the page.

A workflow has two forms. In the API's, a node is `{"class_type": .., "inputs": {name: value or
[node, output]}}`; in the page's, nodes have places, numbered links and their widgets' values in
order (version 0.4). Definitions have the shape of ComfyUI's own `/object_info`, so what it answers
can be used here too; `definitions.json` holds those of the nodes that our workflows use. `python -m
comfyui.graph` lays `workflows/api/*.json` out beside that folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ANY = "*"
"""The type of an input that takes whatever there is."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
PYTHON_TYPES = {"INT": int, "FLOAT": int | float, "STRING": str, "BOOLEAN": bool, "COMBO": str}
COLUMN, ROW, SIZE = 420, 300, (340, 200)

Workflow = dict[str, Any]
Definitions = Mapping[str, Any]


def definitions() -> dict[str, Any]:
    """Return the definitions of ComfyUI's own nodes that our workflows use, and of ours."""
    found: dict[str, Any] = json.loads((HERE / "definitions.json").read_text(encoding="utf-8"))
    return found


def problems(api: Workflow, known: Definitions) -> list[str]:
    """List what ComfyUI would refuse in a workflow of the API's form: nodes, inputs, values, links
    and their types.
    """
    found = []
    for name, node in api.items():
        definition = known.get(node["class_type"])
        if definition is None:
            found.append(f"node {name}: there is no {node['class_type']}")
            continue
        inputs, where = inputs_of(definition), f"node {name} ({node['class_type']})"
        missing = set(definition["input"].get("required", {})) - set(node["inputs"])
        found += [f"{where}: {each} is missing" for each in sorted(missing)]
        for each, value in node["inputs"].items():
            if each not in inputs:
                found.append(f"{where}: has no input {each}")
            elif is_link(value):
                found += _link_problems(
                    api, known, value, kind_of(inputs[each]), f"{where}: {each}"
                )
            else:
                found += [
                    f"{where}: {each} {problem}" for problem in _value_problems(value, inputs[each])
                ]
    if not any(known.get(node["class_type"], {}).get("output_node") for node in api.values()):
        found.append("no node gives anything out")
    return found


def page_problems(page: Workflow, known: Definitions) -> list[str]:
    """List what is wrong in a workflow of the page's form; its links must agree with themselves at
    both ends.
    """
    nodes = {node["id"]: node for node in page["nodes"]}
    found = []
    for number, start, output, end, place, kind in page["links"]:
        out, into = nodes[start]["outputs"][output], nodes[end]["inputs"][place]
        agree = out["type"] == kind and into["type"] in (kind, ANY) and into["link"] == number
        if not agree or number not in (out["links"] or []):
            found.append(f"link {number} of {kind}: {out} and {into} do not agree")
    used = [
        entry["link"]
        for node in nodes.values()
        for entry in node["inputs"]
        if entry["link"] is not None
    ]
    if sorted(used) != sorted(link[0] for link in page["links"]):
        found.append(
            f"links {sorted(used)} are used, {sorted(link[0] for link in page['links'])} are there"
        )
    for node in nodes.values():
        outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        definition = known.get(node["type"], {"output": [], "output_name": []})
        if outputs != list(zip(definition["output_name"], definition["output"], strict=True)):
            found.append(f"node {node['id']} ({node['type']}): has outputs {outputs}")
    return found + problems(from_page(page, known), known)


def to_page(api: Workflow, known: Definitions) -> Workflow:
    """Lay a workflow of the API's form out for the page: a column for each step away from the
    loaders.
    """
    depths = {name: _depth(api, name) for name in api}
    order = sorted(api, key=lambda name: (depths[name], int(name)))
    rows: dict[int, int] = {}
    nodes: dict[str, Workflow] = {}
    links: list[list[Any]] = []
    for place, name in enumerate(order):
        depth, kind = depths[name], api[name]["class_type"]
        rows[depth] = rows.get(depth, -1) + 1
        outputs = zip(known[kind]["output_name"], known[kind]["output"], strict=True)
        nodes[name] = {
            "id": int(name),
            "type": kind,
            "pos": [60 + COLUMN * depth, 60 + ROW * rows[depth]],
            "size": list(SIZE),
            "flags": {},
            "order": place,
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs],
            "properties": {"Node name for S&R": kind},
            "widgets_values": _widget_values(api[name], known[kind]),
        }
        for each, spec in inputs_of(known[kind]).items():
            value = api[name]["inputs"].get(each)
            if kind_of(spec) in WIDGETS and not is_link(value):
                continue
            entry: Workflow = {"name": each, "type": kind_of(spec), "link": None}
            if kind_of(spec) in WIDGETS:
                entry["widget"] = {"name": each}
            if is_link(value):
                start, output = value
                entry["link"] = len(links) + 1
                nodes[start]["outputs"][output]["links"].append(entry["link"])
                ends = [int(start), output, int(name), len(nodes[name]["inputs"])]
                links.append([entry["link"], *ends, nodes[start]["outputs"][output]["type"]])
            nodes[name]["inputs"].append(entry)
    numbers = {"last_node_id": max(map(int, api)), "last_link_id": len(links)}
    rest = {"groups": [], "config": {}, "extra": {}, "version": 0.4}
    return {**numbers, "nodes": list(nodes.values()), "links": links, **rest}


def from_page(page: Workflow, known: Definitions) -> Workflow:
    """Return the API's form of a workflow of the page's, as the page itself sends it."""
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    api = {}
    for node in sorted(page["nodes"], key=lambda node: node["id"]):
        definition = known.get(node["type"], {"input": {}})
        names = [
            name
            for each, spec in inputs_of(definition).items()
            if kind_of(spec) in WIDGETS
            for name in ([each, None] if _is_rolled(spec) else [each])
        ]
        given = dict(zip(names, node.get("widgets_values", []), strict=True))
        given |= {
            entry["name"]: links[entry["link"]]
            for entry in node["inputs"]
            if entry["link"] is not None
        }
        inputs = {name: given[name] for name in inputs_of(definition) if name in given}
        api[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return api


def inputs_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return all inputs of a node by name: the type, or the choices, and what else is said of it."""
    return {**definition["input"].get("required", {}), **definition["input"].get("optional", {})}


def kind_of(spec: list[Any]) -> str:
    """Return the type of an input; choices may stand in its place."""
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def is_link(value: object) -> bool:
    """Tell whether an input comes from another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _said_of(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _is_rolled(spec: list[Any]) -> bool:
    """A seed's widget is followed by one that says what becomes of it after every run."""
    return bool(_said_of(spec).get("control_after_generate"))


def _link_problems(
    api: Workflow, known: Definitions, link: list[Any], wanted: str, where: str
) -> list[str]:
    start, output = link
    if start not in api:
        return [f"{where} comes from node {start}, which is not there"]
    if api[start]["class_type"] not in known:
        return []  # told of that node already
    given = known[api[start]["class_type"]]["output"]
    if not 0 <= output < len(given):
        return [f"{where} comes from output {output} of node {start}, which has {len(given)}"]
    return (
        []
        if wanted in (given[output], ANY)
        else [f"{where} is {wanted}, node {start} gives {given[output]}"]
    )


def _value_problems(value: object, spec: list[Any]) -> list[str]:
    kind, said = kind_of(spec), _said_of(spec)
    if kind not in WIDGETS:
        return [f"is {kind} and needs a link"]
    if not isinstance(value, PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "BOOLEAN"):
        return [f"is {kind}, not {value!r}"]
    choices = spec[0] if isinstance(spec[0], list) else said.get("options", [])
    if kind == "COMBO" and choices and value not in choices:
        return [f"is none of {', '.join(map(str, choices))}: {value!r}"]
    if kind in ("INT", "FLOAT") and not said.get("min", value) <= value <= said.get("max", value):
        return [f"lies in {said.get('min')}..{said.get('max')}, not at {value!r}"]
    return []


def _depth(api: Workflow, name: str) -> int:
    starts = [value[0] for value in api[name]["inputs"].values() if is_link(value)]
    return 1 + max((_depth(api, start) for start in starts), default=-1)


def _widget_values(node: Workflow, definition: Mapping[str, Any]) -> list[Any]:
    values = []
    for name, spec in inputs_of(definition).items():
        if kind_of(spec) in WIDGETS and (
            name in node["inputs"] or name in definition["input"].get("required", {})
        ):
            value = node["inputs"].get(name)
            values += [
                _said_of(spec).get("default", "") if value is None or is_link(value) else value
            ]
            values += ["fixed"] if _is_rolled(spec) else []
    return values


def main() -> None:
    """Write the page's form of every workflow."""
    for path in sorted((HERE / "workflows" / "api").glob("*.json")):
        page = to_page(json.loads(path.read_text(encoding="utf-8")), definitions())
        (path.parent.parent / path.name).write_text(
            json.dumps(page, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
