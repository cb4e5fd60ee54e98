"""Make mini on a GPU that is to be had for minutes at a time: one part of it with each call.

    python benchmarks/mini_gpu.py vae --out out/vae
    python benchmarks/mini_gpu.py teacher --take out/vae --out out/teacher
    python benchmarks/mini_gpu.py lora --take out/teacher --out out/lora
    python benchmarks/mini_gpu.py full --take out/teacher --out out/full
    python benchmarks/mini_gpu.py silhouette --take out/teacher --out out/silhouette

Each part is one recipe, trained by the very command that docs/training.md names, and ends by itself
within ten minutes (`limit_seconds` in the recipes). Whatever must come back lies in `--out` and is
renewed with every checkpoint, once a minute: the weights in pieces of less than 16 MiB, the newest
sheet of pictures, the log and the figures, eight files at most and less than 64 MiB together. So a
machine that is taken away costs a minute. `--take` unpacks what earlier parts brought back; without
an autoencoder among it the teacher takes the one in `examples/mini`. On the same machine the same
call goes on where it stopped.

`--scale 100 --device cpu` rehearses a part at a hundredth of its size.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import threading
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from twostep.cli import app
from twostep.files import PARTIAL_SUFFIX, write_atomically
from twostep.pretrain.parts import find_part_recipe
from twostep.training.recipe import find_recipe
from twostep.training.run_log import read_log

PIECE_BYTES = 15_500_000
MOST_BYTES = 60_000_000
"""Of all pieces together, so that they, pictures and log stay below 64 MiB."""

_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_AT_REST = 3.0
"""A model whose files have not changed for so long is not being written."""

FIGURES = "figures.json"


@dataclass(frozen=True)
class Job:
    """One part: its recipe, and what of its results comes back.

    Args:
        verb: the command that runs it.
        recipe: its name, and that of its run's folder.
        needs: keys of the recipe that name the results of other parts, relative to all runs.
        made: where a result lies that was made before, by its key; taken where no run has it.
        kept: patterns of what comes back, within the run's model folder; of a pattern's files the
            newest come first, and none for which there is no room.
    """

    verb: str
    recipe: str
    needs: Mapping[str, str]
    made: Mapping[str, Path] = field(default_factory=dict)
    kept: tuple[str, ...] = ("**/*",)

    def overrides(self, runs: Path) -> list[str]:
        """Return where the recipe finds what it needs."""
        found = {key: runs / place for key, place in self.needs.items()}
        found |= {key: path for key, path in self.made.items() if not found[key].exists()}
        return [f'{key}="{path.as_posix()}"' for key, path in found.items()]


JOBS = {
    "vae": Job("pretrain", "mini-vae", {}),
    "teacher": Job(
        "pretrain",
        "mini-teacher",
        {"autoencoder": "mini-vae/model"},
        made={"autoencoder": Path(__file__).parents[1] / "examples" / "mini"},
    ),
    "silhouette": Job("pretrain", "mini-silhouette", {"model": "mini-teacher/model"}),
    # The teacher is in their folders too; it came back by itself.
    "lora": Job("distill", "mini-lora", {"model": "mini-teacher/model"}, kept=("students/*",)),
    "full": Job("distill", "mini", {"model": "mini-teacher/model"}, kept=("students/*",)),
}


def scaled(job: Job, scale: int) -> list[str]:
    """Return overrides that make a part smaller: so many times fewer iterations and scenes, and
    batches of a sixteenth, of two at least.
    """
    if scale == 1:
        return []
    find = find_part_recipe if job.verb == "pretrain" else find_recipe
    recipe = tomllib.loads(find(job.recipe).read_text(encoding="utf-8"))
    if job.verb == "pretrain":
        sizes = {key: recipe[key] for key in ("scenes", "num_pictures") if key in recipe}
        found = [f"{key}={max(16, value // scale)}" for key, value in sizes.items()]
        return [*found, *_scaled_loop(recipe["loop"], "loop", scale)]
    found = [f"data_options.count={max(16, recipe['data_options']['count'] // scale)}"]
    found += _scaled_loop(recipe["defaults"], "defaults", scale)
    found.append("defaults.methods.adversarial.discriminator_warmup=1")
    for position, stage in enumerate(recipe["stages"]):
        found.append(f"stages.{position}.iterations={max(3, stage['iterations'] // scale)}")
    return found


def _scaled_loop(loop: Mapping[str, Any], path: str, scale: int) -> list[str]:
    values = {
        "iterations": max(3, loop["iterations"] // scale),
        "batch_size": max(2, loop["batch_size"] // 16),
        "warmup_iterations": max(1, loop["warmup_iterations"] // scale),
        "log_every": max(1, loop["log_every"] // scale),
    }
    return [f"{path}.{key}={value}" for key, value in values.items()]


def pack(files: Iterable[Path], root: Path, out: Path) -> list[str]:
    """Write files into `out` as the pieces of one archive; return the digests of the pieces.

    Args:
        files: what to write, the most wanted first; those for which there is no room are left out.
        root: what their names in the archive are relative to.
        out: takes the pieces.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in files:
            if archive.tell() + path.stat().st_size < MOST_BYTES:
                tar.add(path, path.relative_to(root).as_posix(), recursive=False)
    whole = archive.getvalue()
    pieces = [whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)]
    for number, piece in enumerate(pieces):
        with write_atomically(out / f"weights-{number}.part") as file:
            file.write(piece)
    return [hashlib.sha256(piece).hexdigest() for piece in pieces]


def unpack(taken: Path, root: Path) -> None:
    """Write the files that `pack` put into a folder back to where they lay; ValueError for others.

    Pieces of two moments, as of a machine that was taken away while they were written, are refused.
    """
    figures = json.loads((taken / FIGURES).read_text())
    pieces = []
    for number, digest in enumerate(figures["pieces"]):
        path = taken / f"weights-{number}.part"
        piece = path.read_bytes()
        if hashlib.sha256(piece).hexdigest() != digest:
            raise ValueError(f"{path} is not what {FIGURES} says; take another run's pieces.")
        pieces.append(piece)
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as tar:
        tar.extractall(root, filter="data")


class Keeper(threading.Thread):
    """Renews what must come back whenever the run's model was written anew."""

    def __init__(self, part: str, runs: Path, out: Path) -> None:
        """Watch a part's run."""
        super().__init__(daemon=True)
        self.job = JOBS[part]
        self.part = part
        self.runs = runs
        self.folder = runs / self.job.recipe
        self.out = out
        self.begun = time.monotonic()
        self._ended = threading.Event()
        self._packed_at = 0.0

    def run(self) -> None:
        """Look every few seconds, until it is told that the run has ended."""
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                files = self._files()
                newest = max((path.stat().st_mtime for path in files), default=0.0)
                if newest > self._packed_at and time.time() - newest > _SECONDS_AT_REST:
                    self.keep()
            except FileNotFoundError:
                # A file was just replaced; the next look finds all of them.
                continue

    def end(self) -> None:
        """Stop looking, and keep the run as it is."""
        self._ended.set()
        self.join()
        self.keep()

    def keep(self) -> None:
        """Write weights, pictures, log and figures."""
        files = self._files()
        if not files:
            return
        newest = max(path.stat().st_mtime for path in files)
        digests = pack(files, self.runs, self.out)
        self._packed_at = newest
        sheets = sorted(self.folder.glob("samples/*.png"), key=lambda path: path.stat().st_mtime)
        if sheets:
            shutil.copyfile(sheets[-1], self.out / "sheet.png")
        log = self.folder / "log.jsonl"
        shutil.copyfile(log, self.out / "log.jsonl")
        figures = {
            "part": self.part,
            "seconds": round(time.monotonic() - self.begun, 1),
            "sheet": sheets[-1].name if sheets else None,
            "pieces": digests,
            "last": last_figures(read_log(log)[0]),
        }
        # Last, for it says what the others must be.
        with write_atomically(self.out / FIGURES) as file:
            file.write(json.dumps(figures, indent=1).encode())

    def _files(self) -> list[Path]:
        model = self.folder / "model"
        found: list[Path] = []
        for pattern in self.job.kept:
            files = [
                path
                for path in model.glob(pattern)
                if path.is_file() and PARTIAL_SUFFIX not in path.as_posix()
            ]
            # What was written last is wanted most.
            files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            found += files
        return found


def last_figures(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the last value of every figure in a log, by part."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        found.setdefault(line["part"], {}).update(line)
    return found


def main() -> None:
    """Unpack what is needed, run one part, and keep what must come back."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=JOBS)
    parser.add_argument("--out", type=Path, required=True, help="takes what must come back")
    parser.add_argument(
        "--take", type=Path, action="append", default=[], help="an --out of an earlier part"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs lie")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scale", type=int, default=1, help="100 for a hundredth of the size")
    parser.add_argument("--drawings", type=Path, help="a folder of other drawings")
    parser.add_argument("-o", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    for taken in options.take:
        unpack(taken, options.runs)
    job = JOBS[options.part]
    overrides = [
        f"device={options.device}",
        *job.overrides(options.runs),
        *scaled(job, options.scale),
        *options.overrides,
    ]
    arguments = [job.verb, job.recipe, "--out", str(options.runs / job.recipe)]
    if options.drawings is not None and job.verb == "pretrain":
        arguments += ["--drawings", str(options.drawings)]
    elif options.drawings is not None:
        overrides.append(f'data_options.drawings="{options.drawings.as_posix()}"')
    for override in overrides:
        arguments += ["-o", override]
    keeper = Keeper(options.part, options.runs, options.out)
    keeper.start()
    try:
        app(arguments, standalone_mode=False)
    finally:
        keeper.end()
    print((options.out / FIGURES).read_text())


if __name__ == "__main__":
    main()
