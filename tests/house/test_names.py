"""Names say what a thing is, and whatever is public says it in a sentence."""

import ast
from pathlib import PurePath

FORBIDDEN_MODULES = {"util", "common", "helper", "base", "core", "manager", "misc"}
FORBIDDEN_CLASS_ENDS = ("Manager", "Helper", "Wrapper", "Mixin")


def public_definitions(tree):
    """Every public function and class of a module, and every public method of a public class."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                waiting.extend(node.body)


def test_modules_are_named_after_one_thing(sources):
    vague = [
        source.path
        for source in sources
        for part in PurePath(source.path).with_suffix("").parts
        if {word.removesuffix("s") for word in part.split("_")} & FORBIDDEN_MODULES
    ]
    assert not vague, f"say what is in them: {vague}"


def test_classes_are_named_after_what_they_are(sources):
    vague = [
        f"{source.path}:{node.lineno} {node.name}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef)
        and (node.name.endswith(FORBIDDEN_CLASS_ENDS) or node.name.lstrip("_").startswith("Base"))
    ]
    assert not vague, f"a class is a noun of the field: {vague}"


def test_every_module_says_what_it_is_for(sources):
    silent = [source.path for source in sources if not ast.get_docstring(source.tree)]
    assert not silent, f"no docstring: {silent}"


def test_every_public_function_and_class_says_what_it_is(sources):
    silent = [
        f"{source.path}:{node.lineno} {node.name}"
        for source in sources
        for node in public_definitions(source.tree)
        if not (ast.get_docstring(node) or "")
        .split("\n\n")[0]
        .rstrip()
        .endswith((".", ":", "?", ")"))
    ]
    assert not silent, f"no docstring, or its first paragraph is no sentence: {silent}"
