"""A graph of ComfyUI's nodes while it is built, and the two things that its parts share."""

from __future__ import annotations

from typing import Any

Link = list[Any]
"""A node and the number of its output."""


class Graph:
    """Nodes by their numbers, as they are added."""

    def __init__(self) -> None:
        """Begin with none."""
        self.nodes: dict[str, Any] = {}

    def add(self, kind: str, **inputs: Any) -> Link:
        """Add a node; returns its first output."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]


def output(node: Link, number: int) -> Link:
    """Return another output of a node."""
    return [node[0], number]
