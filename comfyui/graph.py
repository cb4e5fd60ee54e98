"""Workflows: checked against node definitions, and laid out for ComfyUI's page.

A workflow has two forms. In the API's form a node is `{"class_type": .., "inputs": {name: value or
[node, output]}}`. In the page's form (version 0.4) nodes have places, numbered links, and the
values of their widgets in order. Definitions have the shape of ComfyUI's own `/object_info`, so
that its answers can be used here too; `definitions.json` holds those of the nodes in our workflows.

`python -m comfyui.graph` lays `workflows/api/*.json` out beside that folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

ANY = "*"
"""The type of an input that takes whatever there is."""

PYTHON_TYPES = {"INT": int, "FLOAT": int | float, "STRING": str, "BOOLEAN": bool, "COMBO": str}
"""The types of inputs that are typed into a widget, and the Python types of their values."""

WIDGETS = tuple(PYTHON_TYPES)

COLUMN = 420
ROW = 300
SIZE = (340, 200)
"""The distances and the size of nodes on the page, in its pixels."""

MARGIN = 60

Workflow = dict[str, Any]
Definitions = Mapping[str, Any]


def definitions() -> dict[str, Any]:
    """Return the definitions of the nodes in our workflows, ComfyUI's own and ours."""
    known: dict[str, Any] = json.loads((HERE / "definitions.json").read_text(encoding="utf-8"))
    return known


def problems(api: Workflow, known: Definitions) -> list[str]:
    """List what ComfyUI would refuse in a workflow of the API's form.

    These are unknown nodes, missing or unknown inputs, wrong values, and links of the wrong type.
    """
    listed = []
    for name, node in api.items():
        definition = known.get(node["class_type"])
        if definition is None:
            listed.append(f"node {name}: there is no {node['class_type']}")
        else:
            listed += _node_problems(api, known, name, definition)
    if not any(known.get(node["class_type"], {}).get("output_node") for node in api.values()):
        listed.append("no node gives anything out")
    return listed


def _node_problems(
    api: Workflow, known: Definitions, name: str, definition: Mapping[str, Any]
) -> list[str]:
    """List what is wrong with the inputs of one node."""
    node = api[name]
    where = f"node {name} ({node['class_type']})"
    inputs = inputs_of(definition)
    missing = set(definition["input"].get("required", {})) - set(node["inputs"])
    listed = [f"{where}: {each} is missing" for each in sorted(missing)]
    for each, value in node["inputs"].items():
        if each not in inputs:
            listed.append(f"{where}: has no input {each}")
        elif is_link(value):
            wanted = kind_of(inputs[each])
            listed += _link_problems(api, known, value, wanted, f"{where}: {each}")
        else:
            for problem in _value_problems(value, inputs[each]):
                listed.append(f"{where}: {each} {problem}")
    return listed


def page_problems(page: Workflow, known: Definitions) -> list[str]:
    """List what is wrong in a workflow of the page's form.

    Its links must agree with the nodes at both ends; the rest is checked as by `problems`.
    """
    nodes = {node["id"]: node for node in page["nodes"]}
    listed = []
    for number, start, output, end, place, kind in page["links"]:
        source = nodes[start]["outputs"][output]
        target = nodes[end]["inputs"][place]
        agree = source["type"] == kind and target["type"] in (kind, ANY)
        if not agree or target["link"] != number or number not in (source["links"] or []):
            listed.append(f"link {number} of {kind}: {source} and {target} do not agree")
    entries = [entry for node in nodes.values() for entry in node["inputs"]]
    used = sorted(entry["link"] for entry in entries if entry["link"] is not None)
    there = sorted(link[0] for link in page["links"])
    if used != there:
        listed.append(f"links {used} are used, {there} are there")
    for node in nodes.values():
        outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        definition = known.get(node["type"], {"output": [], "output_name": []})
        if outputs != list(zip(definition["output_name"], definition["output"], strict=True)):
            listed.append(f"node {node['id']} ({node['type']}): has outputs {outputs}")
    return listed + problems(from_page(page, known), known)


def to_page(api: Workflow, known: Definitions) -> Workflow:
    """Lay a workflow of the API's form out for the page.

    There is a column for each step away from the loaders.
    """
    depths = {name: _depth(api, name) for name in api}
    rows: dict[int, int] = {}
    nodes: dict[str, Workflow] = {}
    links: list[list[Any]] = []
    for order, name in enumerate(sorted(api, key=lambda name: (depths[name], int(name)))):
        depth = depths[name]
        row = rows.get(depth, 0)
        rows[depth] = row + 1
        node = _page_node(name, api[name], known[api[name]["class_type"]])
        node["pos"] = [MARGIN + COLUMN * depth, MARGIN + ROW * row]
        node["order"] = order
        nodes[name] = node
        _connect(name, api[name], known[api[name]["class_type"]], nodes, links)
    return {
        "last_node_id": max(map(int, api)),
        "last_link_id": len(links),
        "nodes": list(nodes.values()),
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def _page_node(name: str, node: Workflow, definition: Mapping[str, Any]) -> Workflow:
    """Return a node of the page's form without links, at no place yet."""
    kind = node["class_type"]
    outputs = zip(definition["output_name"], definition["output"], strict=True)
    return {
        "id": int(name),
        "type": kind,
        "pos": [],
        "size": list(SIZE),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in outputs],
        "properties": {"Node name for S&R": kind},
        "widgets_values": _widget_values(node, definition),
    }


def _connect(
    name: str,
    node: Workflow,
    definition: Mapping[str, Any],
    nodes: dict[str, Workflow],
    links: list[list[Any]],
) -> None:
    """Add the inputs of a node to the page, and their links, which are numbered from 1."""
    for each, spec in inputs_of(definition).items():
        value = node["inputs"].get(each)
        is_widget = kind_of(spec) in WIDGETS
        if is_widget and not is_link(value):
            continue  # its value stands in the widget
        entry: Workflow = {"name": each, "type": kind_of(spec), "link": None}
        if is_widget:
            entry["widget"] = {"name": each}
        if is_link(value):
            start, output = value
            source = nodes[start]["outputs"][output]
            number = len(links) + 1
            entry["link"] = number
            source["links"].append(number)
            place = len(nodes[name]["inputs"])
            links.append([number, int(start), output, int(name), place, source["type"]])
        nodes[name]["inputs"].append(entry)


def from_page(page: Workflow, known: Definitions) -> Workflow:
    """Return the API's form of a workflow of the page's, as the page itself sends it."""
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    api = {}
    for node in sorted(page["nodes"], key=lambda node: node["id"]):
        inputs = inputs_of(known.get(node["type"], {"input": {}}))
        values = dict(zip(_widget_names(inputs), node.get("widgets_values", []), strict=True))
        for entry in node["inputs"]:
            if entry["link"] is not None:
                values[entry["name"]] = links[entry["link"]]
        ordered = {name: values[name] for name in inputs if name in values}
        api[str(node["id"])] = {"class_type": node["type"], "inputs": ordered}
    return api


def _widget_names(inputs: Mapping[str, Any]) -> list[str | None]:
    """List the inputs with widgets; None stands for the second widget that some have."""
    names: list[str | None] = []
    for name, spec in inputs.items():
        if kind_of(spec) in WIDGETS:
            names.append(name)
            if _second_widget(spec) is not None:
                names.append(None)
    return names


def inputs_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return all inputs of a node by name: each its type, or its choices, and its options."""
    inputs = definition["input"]
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


def kind_of(spec: list[Any]) -> str:
    """Return the type of an input; choices may stand in its place."""
    return "COMBO" if isinstance(spec[0], list) else str(spec[0])


def is_link(value: object) -> bool:
    """Tell whether an input comes from another node's output."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _options(spec: list[Any]) -> dict[str, Any]:
    """Return what a definition says of an input beside its type: default, bounds, choices."""
    return spec[1] if len(spec) > 1 else {}


def _second_widget(spec: list[Any]) -> str | None:
    """Return the value of the widget that follows an input's own; None if none does.

    Behind a seed one says what becomes of it after every run; behind a picture is an upload.
    """
    options = _options(spec)
    if options.get("control_after_generate"):
        return "fixed"
    return "image" if options.get("image_upload") else None


def _link_problems(
    api: Workflow, known: Definitions, link: list[Any], wanted: str, where: str
) -> list[str]:
    """List what is wrong with a link; `wanted` is the type of the input that it goes to."""
    start, output = link
    if start not in api:
        return [f"{where} comes from node {start}, which is not there"]
    if api[start]["class_type"] not in known:
        return []  # that node itself is listed
    given = known[api[start]["class_type"]]["output"]
    if not 0 <= output < len(given):
        return [f"{where} comes from output {output} of node {start}, which has {len(given)}"]
    if wanted not in (given[output], ANY):
        return [f"{where} is {wanted}, node {start} gives {given[output]}"]
    return []


def _value_problems(value: object, spec: list[Any]) -> list[str]:
    """List what is wrong with a value that was typed into a widget."""
    kind = kind_of(spec)
    options = _options(spec)
    if kind not in WIDGETS:
        return [f"is {kind} and needs a link"]
    is_misplaced_bool = isinstance(value, bool) and kind != "BOOLEAN"
    if not isinstance(value, PYTHON_TYPES[kind]) or is_misplaced_bool:
        return [f"is {kind}, not {value!r}"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    if kind == "COMBO" and choices and value not in choices:
        return [f"is none of {', '.join(map(str, choices))}: {value!r}"]
    lowest = options.get("min", value)
    highest = options.get("max", value)
    if kind in ("INT", "FLOAT") and not lowest <= value <= highest:
        return [f"lies in {options.get('min')}..{options.get('max')}, not at {value!r}"]
    return []


def _depth(api: Workflow, name: str) -> int:
    """Return how many nodes lie between a node and the farthest loader that it depends on."""
    starts = [value[0] for value in api[name]["inputs"].values() if is_link(value)]
    return 1 + max((_depth(api, start) for start in starts), default=-1)


def _widget_values(node: Workflow, definition: Mapping[str, Any]) -> list[Any]:
    """List the values of a node's widgets; what comes by a link has its default there."""
    required = definition["input"].get("required", {})
    values = []
    for name, spec in inputs_of(definition).items():
        if kind_of(spec) not in WIDGETS or (name not in node["inputs"] and name not in required):
            continue
        value = node["inputs"].get(name)
        if value is None or is_link(value):
            value = _options(spec).get("default", "")
        values.append(value)
        second = _second_widget(spec)
        if second is not None:
            values.append(second)
    return values


def main() -> None:
    """Write the page's form of every workflow."""
    for path in sorted((HERE / "workflows" / "api").glob("*.json")):
        page = to_page(json.loads(path.read_text(encoding="utf-8")), definitions())
        text = json.dumps(page, indent=2) + "\n"
        (path.parent.parent / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
