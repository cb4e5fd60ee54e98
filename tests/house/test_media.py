"""Training knows no medium: what makes sounds or moving pictures is found through the seams."""

import ast
from pathlib import Path

import twostep

PACKAGE = Path(twostep.__file__).parent
MEDIA = {
    *("audio", "sound", "sounds", "notes", "spectrogram", "pitch"),
    *("video", "motion", "clips", "animations"),
}


def imported(path: Path) -> set[str]:
    """Return every module that a file imports, and every name that it imports from one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_no_file_of_distillation_training_or_diffusion_knows_a_medium() -> None:
    files = [
        *PACKAGE.glob("distill/**/*.py"),
        *PACKAGE.glob("training/*.py"),
        *PACKAGE.glob("diffusion/*.py"),
    ]
    assert {"trainer.py", "chain.py", "plan.py", "health.py", "adversarial.py"} <= {
        path.name for path in files
    }
    knowing = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in files
        for name in imported(path)
        for part in name.removeprefix("twostep.").replace("_", ".").split(".")
        if part in MEDIA
    ]
    assert not knowing
