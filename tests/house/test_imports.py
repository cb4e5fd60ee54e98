"""`import twostep` is cheap, and its public names are there when they are touched."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import twostep

HEAVY = ("torch", "diffusers", "transformers", "fastapi", "numpy", "PIL", "pydantic")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_loads_nothing_heavy():
    found = run(f"import sys, twostep; print([name for name in {HEAVY} if name in sys.modules])")
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_the_contract_and_the_flow_know_no_networks():
    found = run(
        "import sys, twostep; twostep.Contract, twostep.solve; print('diffusers' in sys.modules)"
    )
    assert found.stdout.strip() == "False", found.stderr


@pytest.mark.parametrize("name", twostep.__all__)
def test_every_public_name_is_there(name):
    assert getattr(twostep, name) is getattr(twostep, name)
    assert name in dir(twostep)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"'generat'; public names: Bundle, Client, Contract"):
        _ = twostep.generat


def test_the_type_checker_sees_the_same_names():
    tree = ast.parse(Path(twostep.__file__).read_text(encoding="utf-8"))
    (guarded,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == twostep._HOMES
    assert set(seen) == set(twostep.__all__) - {"TwostepError", "__version__"}
