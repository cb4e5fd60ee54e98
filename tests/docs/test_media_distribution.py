"""The second distribution, twostep-media: its version, its models and its size."""

import ast
import tomllib
from pathlib import Path

import twostep
from twostep.formats import read_contracts

FOLDER = Path(__file__).parents[2] / "distributions" / "media"
PROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODELS = PROJECT["entry-points"]["twostep.models"]

MOST_BYTES = 40 * 2**20


def test_its_version_is_twosteps() -> None:
    assert PROJECT["version"] == twostep.__version__


def test_every_entry_point_is_a_model_of_that_name() -> None:
    module = FOLDER / "twostep_media" / "__init__.py"
    assigned = {
        target.id
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert MODELS
    for name, place in MODELS.items():
        package, _, attribute = place.partition(":")
        assert package == "twostep_media" and attribute in assigned
        contracts = read_contracts(FOLDER / "twostep_media" / name)
        assert contracts[0].name == name
        assert [contract.role for contract in contracts[1:]] == ["student"] * len(contracts[1:])


def test_it_stays_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
