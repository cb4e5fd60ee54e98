"""The budgets: what needs more deletes something first."""

import ast

import twostep

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_INDENTATION = 4
MAX_PACKAGE_LINES = 7000
MAX_PUBLIC_NAMES = 15


def test_files_are_short(sources):
    long = [f"{source.path}: {len(source.lines)} lines" for source in sources if len(source.lines) > MAX_FILE_LINES]
    assert not long, f"over {MAX_FILE_LINES} lines: {long}"


def test_functions_are_short(sources):
    long = [
        f"{source.path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"over {MAX_FUNCTION_LINES} lines: {long}"


def test_statements_are_not_deep(sources):
    deep = {
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.stmt) and node.col_offset > 4 * MAX_INDENTATION
    }
    assert not deep, f"indented over {MAX_INDENTATION} levels: {sorted(deep)}"


def test_the_package_is_small(sources):
    total = sum(len(source.lines) for source in sources)
    assert total <= MAX_PACKAGE_LINES, f"{total} lines"


def test_few_names_are_public():
    assert len(twostep.__all__) == len(set(twostep.__all__)) <= MAX_PUBLIC_NAMES
