"""Two processes that work in one folder at the same time: one is refused, or both are right."""

from pathlib import Path

import pytest

from .killing import begin_in_words, contents, figures_of, prepare
from .launching import FORKS

REFUSED = (
    "regression",
    "snapshots-and-samples",
    "text",
    "judge",
    "cache-pictures",
    "cache-prompts",
)
"""What one process at a time may do in a folder."""

SHARED = ("export", "convert", "generate", "drawings")
"""What writes files that are whole each, whoever writes them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all kinds read."""
    folder = tmp_path_factory.mktemp("same")
    prepare(folder)
    return folder


def run_together(kinds: str, outs: list[Path], *, at_a_lock: bool = False) -> list[str]:
    """Work in folders at the same time; return what each said last, empty where all went well.

    With `at_a_lock` all come to their first lock at the same moment.
    """
    said = [out.with_name(f"{out.name}-{number}.txt") for number, out in enumerate(outs)]
    door = FORKS.Barrier(len(outs), timeout=300) if at_a_lock else None
    processes = [
        begin_in_words(kinds, out, path, door=door) for out, path in zip(outs, said, strict=True)
    ]
    for process in processes:
        process.join()
    texts = [path.read_text() for path in said]
    assert all(process.exitcode in (0, 1) for process in processes), texts
    return [
        text.splitlines()[-1] if process.exitcode else ""
        for process, text in zip(processes, texts, strict=True)
    ]


def alone_and_together(
    kind: str, folder: Path, *, at_a_lock: bool = False
) -> tuple[Path, Path, list[str]]:
    """Work alone in one folder and twice at a time in another; return both, and who was refused."""
    whole = folder / f"{kind}-whole"
    assert run_together(kind, [whole]) == [""]
    together = folder / kind
    together.mkdir()
    said = run_together(kind, [together, together], at_a_lock=at_a_lock)
    refused = [words for words in said if words]
    return whole, together, refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_the_second_is_refused_and_the_first_undisturbed(kind: str, folder: Path) -> None:
    whole, together, refused = alone_and_together(kind, folder, at_a_lock=True)
    assert len(refused) == 1
    assert "Another process is at work in" in refused[0]
    assert contents(together) == contents(whole)
    assert figures_of(together) == figures_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED)
def test_both_write_and_all_is_whole(kind: str, folder: Path) -> None:
    whole, together, refused = alone_and_together(kind, folder)
    # Converting never writes over what is there, so the slower one may find it done.
    assert all("is already there" in words for words in refused)
    assert len(refused) <= (kind == "convert")
    assert contents(together) == contents(whole)


@pytest.mark.slow
def test_two_runs_fill_one_bank(folder: Path) -> None:
    whole = folder / "bank-whole"
    assert run_together("bank", [whole]) == [""]
    one, other = folder / "bank-one", folder / "bank-other"
    (one / "bank").mkdir(parents=True)
    other.mkdir()
    (other / "bank").symlink_to(one / "bank")
    assert run_together("bank", [one, other]) == ["", ""]
    assert contents(one) == contents(whole)
    expected = {
        name: data for name, data in contents(whole).items() if not name.startswith("bank/")
    }
    assert contents(other) == expected
    assert figures_of(one) == figures_of(other) == figures_of(whole)
