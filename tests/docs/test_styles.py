"""The Python of docs/styles.md runs, and does what the page says."""

import re
from pathlib import Path


def test_the_python_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "styles.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    found: dict = {}
    exec(compile(block, "docs/styles.md", "exec"), found)
    assert [found[name].contract.steps for name in ("quick", "better")] == [2, 8]
    assert found["better"].contract.name == "nano-8step:0.9"
    assert found["studio"].load(found["request"]) is found["studio"].load(found["request"])
