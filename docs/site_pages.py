"""Pages of the site that are not files of docs/: the README as the home page, the contributors'
files, and the API reference.

mkdocs calls the functions `on_*` while it builds (mkdocs.yml names this file under `hooks`).
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import twostep

ROOT = Path(__file__).resolve().parents[1]

HOISTED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "comfyui/README.md": "comfyui-nodes.md",
    "examples/openmoji/README.md": "openmoji.md",
    "examples/openmoji/sheet.jpg": "openmoji-sheet.jpg",
    "examples/openmoji/clips-2step.webp": "openmoji-clips-2step.webp",
    "NOTICE": "notice.md",
    "CITATION.cff": "citation.md",
}
"""Files outside docs/, and the pages that they become."""

LINK = re.compile(r"(\]\()([^)#\s]+)")
"""The target of a Markdown link or picture, without its fragment."""

INTO_DOCS = re.compile(r"^(\.\./)*docs/")
"""How a link from outside docs/ into it begins."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the reference to the navigation: the public names first, then a page for each room."""
    pages = [{"Public names": "reference/index.md"}]
    pages += [{room: f"reference/{room}.md"} for room in rooms()]
    config.nav.append({"Reference": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/ and those that are made from the docstrings."""
    pages: dict[str, str] = {}
    for source, page in HOISTED.items():
        if page.endswith(".md"):
            pages[page] = hoist(source)
        else:
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages["reference/index.md"] = public_names()
    for room in rooms():
        pages[f"reference/{room}.md"] = f"::: twostep.{room}\n"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn links from docs/ to files outside of it into links to the pages that these became."""
    for source, page in HOISTED.items():
        markdown = markdown.replace(f"](../{source})", f"]({page})")
    return markdown


def hoist(source: str) -> str:
    """Read a file outside docs/ and let its links lead to pages of the site."""
    text = (ROOT / source).read_text(encoding="utf-8")
    if not source.endswith(".md"):
        return f"# {source.capitalize()}\n\n```text\n{text}```\n"

    def retarget(match: re.Match[str]) -> str:
        return match[1] + HOISTED.get(match[2], INTO_DOCS.sub("", match[2]))

    return LINK.sub(retarget, text)


def rooms() -> list[str]:
    """List the rooms of the package: its folders with Python in them, and its single modules."""
    package = ROOT / "twostep"
    folders = [path.parent.name for path in package.glob("*/__init__.py")]
    modules = [path.stem for path in package.glob("[!_]*.py")]
    return sorted(folders + modules)


def public_names() -> str:
    """Write the page of the names that `import twostep` offers, each from where it is defined."""
    lines = ["# Public names", "", (twostep.__doc__ or "").strip(), ""]
    for name, (module, attribute) in sorted(twostep._HOMES.items()):
        lines += [f"## twostep.{name}", "", f"::: {module}.{attribute}"]
        # The entry that other pages link to is the one on the page of its room.
        lines += ["    options:", "      show_root_heading: false"]
        lines += ["      skip_local_inventory: true", ""]
    return "\n".join(lines)
