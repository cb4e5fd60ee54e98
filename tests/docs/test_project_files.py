"""The files around the code agree with it: versions, changelog, citation, workflow, hooks."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import twostep

ROOT = Path(__file__).parents[2]
LOOSE = {"wandb", "twostep-media"}
"""What has no version to pin: a tracker that is tested without being installed, and our own second
distribution.
"""


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def normalised(name: str) -> str:
    """Spell a distribution's name as the package index does."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_version_is_told_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)$", changelog, re.M)
    citation = read_yaml("CITATION.cff")
    assert project["version"] == twostep.__version__ == citation["version"]
    assert released[0] == (twostep.__version__, str(citation["date-released"]))


def test_the_changelog_has_a_place_for_what_comes_next() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == "Unreleased"


def test_the_workflow_runs_what_people_run() -> None:
    workflow = read_yaml(".github/workflows/ci.yml")
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (python,) = (step["with"] for step in job["steps"] if "python-version" in step.get("with", {}))
    assert python == {
        "python-version": "3.11",
        "cache": "pip",
        "cache-dependency-path": "constraints.txt",
    }


def test_the_hooks_check_what_make_lint_checks() -> None:
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].split("\n\n")[0]
    in_make = set(re.findall(r"\$\(BIN\)/([a-z-]+(?: check| format)?)", lint))
    hooks = [
        hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    in_hooks = {
        re.sub(r"^\.venv/bin/([a-z-]+(?: check| format)?).*", r"\1", hook["entry"])
        for hook in hooks
    }
    assert in_hooks == in_make


def test_everything_that_tests_and_site_need_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        wanted += requirements
    names = {normalised(re.split(r"[\[<>=~!; ]", item)[0]) for item in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if "==" in line}
    assert names - LOOSE <= pinned
