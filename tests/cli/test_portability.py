"""`twostep report --lora` as a user runs it: a table of every base at every scale, and the best of
them named.
"""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from twostep.formats.locate import find_model
from twostep.reports.portability import SCALES

from ..cli.test_draw import assert_one_clean_line

LORA = "nano_2step_lora"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a 3d red apple on a blue background\n\n a dog on a white background \n")
    return path


@pytest.mark.slow
def test_every_base_at_every_scale_and_the_best_of_them(run, model: Path, prompts: Path) -> None:
    answer = run("report", "--lora", LORA, "--bases", f"nano,{model}", "--prompts", prompts)
    assert answer.exit_code == 0, answer.output
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in answer.stdout.splitlines()
        if "│ " in line
    ]
    rows = [row for row in rows if row[3]]  # a long path is folded over several lines
    with_lora = [f"2 steps, LoRA x {scale:g}" for scale in SCALES]
    for start, guidance in ((0, 3), (8, 4)):
        expected = [f"2 steps, guidance {guidance}", "2 steps, no guidance", *with_lora]
        assert [row[1] for row in rows[start : start + 8]] == expected
    looks = [[float(row[3]) for row in rows[start : start + 6]] for start in (2, 10)]
    sums = [a + b for a, b in zip(*looks, strict=True)]
    lines = answer.stdout.replace("\n", "").split("best scale on ")[1:]
    chosen = [SCALES.index(float(line.rpartition(": ")[2])) for line in lines]
    # Two that look alike in the five places that are printed may differ in the sixth.
    for place, distances, half_unit in zip(chosen, (*looks, sums), (0, 0, 1e-5), strict=True):
        assert distances[place] <= min(distances) + half_unit
    assert lines[0].startswith("nano:") and lines[2].startswith("all:")
    # On its own teacher the LoRA is nearer to the guided pictures than the teacher is without it at
    # as few steps.
    assert float(rows[7][2]) < min(float(rows[0][2]), float(rows[1][2]))


@pytest.mark.slow
def test_what_has_no_scale_is_told(run, model: Path, prompts: Path, tmp_path: Path) -> None:
    save_file(load_file(find_model(LORA)), tmp_path / "style.safetensors")
    asked = ("--prompts", prompts)
    answer = run("report", "--lora", tmp_path / "style.safetensors", *asked)
    assert_one_clean_line(answer, "makes no few-step students", "Give a LoRA that does")
    answer = run("report", "--lora", LORA, "--bases", "nano_2step_lora", *asked)
    assert_one_clean_line(answer, "it would be distilled twice")
    assert_one_clean_line(
        run("report", "--lora", LORA, "--bases", "nano,nowhere", *asked), "nowhere does not exist"
    )


def test_one_of_run_and_lora_is_asked_for(run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for words, code, complaint in (
        ((), 2, "give the folder"),
        ((tmp_path, "--lora", LORA), 2, "give the folder"),
        (("--lora", LORA, "--prompts", tmp_path / "empty.txt"), 1, "has no prompts"),
    ):
        answer = run("report", *words)
        assert answer.exit_code == code and complaint in answer.stderr
    assert run("report", "--lora", LORA, "--prompts", tmp_path / "missing.txt").exit_code == 2
