"""What is trained, cached and written by processes that are killed, and how they are killed.

Each kind of work is a function of the folder that it works in, so a process that was forked from
one which has imported everything begins at once. A process is killed with SIGKILL, either after a
random time or at a random one of its operations on files, of which no two moments are alike to
whoever reads the folder after it.

    python -m tests.distill --kills 40 --seed 7 dmd2 ladd

kills these two kinds forty times each; without names it kills every kind.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl  # noqa: F401
import numpy as np
import tomli_w
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file

from twostep.data.encoding import cache_pictures, cache_prompts
from twostep.data.sources import find_entries
from twostep.distill import DistillRecipe, distil
from twostep.errors import TwostepError
from twostep.export.conversion import convert
from twostep.export.writing import export
from twostep.formats.lora_files import write_lora
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle
from twostep.models.saving import save_bundle
from twostep.networks.conditioning import Conditioning
from twostep.pipeline.generation import generate
from twostep.pipeline.provenance import save_images
from twostep.pipeline.request import Request
from twostep.pretrain.drawings import DrawingSet, load_drawings, save_drawings
from twostep.pretrain.model import random_bundle
from twostep.pretrain.parts import load_part
from twostep.pretrain.sizes import SIZES, ModelSize
from twostep.reports.run_page import write_report
from twostep.training.run_folder import RunFolder

from ..export.conftest import random_lora
from ..vanilla import with_sdxl_vae
from .launching import CLOCKS, FORKS

SAMPLE = Path(__file__).parents[1] / "pretrain" / "sample"

MODEL = Path("..") / "model"
"""A teacher with random weights, seen from the folder that a process works in."""

WHOLE = Path("..") / "whole"
"""Another, with the kind of autoencoder that SDXL has."""

LORA = Path("..") / "lora.safetensors"
"""A LoRA that fits both."""

PICTURES = Path("..") / "pictures"
"""Pictures with captions, seen from there."""

_CONDITIONAL = {"name": "adversarial", "objective": "conditional"}
_UNCONDITIONAL = {"name": "adversarial", "objective": "unconditional"}
_LIGHTNING = {"name": "lightning"}
_DMD2 = {"name": "dmd2", "fake_turns": 2}
_BANK = {"bank": "bank", "bank_size": 32}
_LORA = {"lora_rank": 2}
_FROM_TEACHER = {"teacher_steps": 8}

STAGES: dict[str, list[dict[str, Any]]] = {
    "regression": [{"method": {"name": "regression"}, **_FROM_TEACHER}],
    "regression-lora": [{"method": {"name": "regression"}, **_FROM_TEACHER, **_LORA}],
    "reused-landings": [{"method": {"name": "regression", "reuse": 2}, **_FROM_TEACHER}],
    "bank": [{"method": {"name": "regression", **_BANK}, **_FROM_TEACHER, "batch_size": 16}],
    "accumulated": [
        {"method": _CONDITIONAL, **_FROM_TEACHER, "accumulate": 2, "batch_size": 4},
    ],
    "snapshots-and-samples": [
        {
            "method": {"name": "regression"},
            **_FROM_TEACHER,
            **_LORA,
            "snapshot_every": 2,
            "sample_every": 1,
        }
    ],
    "logged-between-checkpoints": [
        {"method": _DMD2, "guidance": 2.0, "log_every": 3, "checkpoint_every": 1}
    ],
    "conversion": [{"method": {"name": "conversion"}}],
    "conditional": [{"method": _CONDITIONAL, **_FROM_TEACHER}],
    "unconditional": [{"method": _UNCONDITIONAL, **_FROM_TEACHER}],
    "shared-base": [
        {"method": {**_UNCONDITIONAL, "discriminator_lora": True}, **_FROM_TEACHER, **_LORA}
    ],
    "matching": [
        {
            "method": {**_UNCONDITIONAL, "matching_weight": 0.5},
            **_FROM_TEACHER,
            "teacher": "first",
        },
    ],
    "lightning-then-on": [
        {"method": {**_LIGHTNING, "objective": objective}, **_FROM_TEACHER}
        for objective in ("conditional", "unconditional")
    ],
    "chain": [
        {"method": {"name": "regression"}, "student_steps": 8, "teacher_steps": 16},
        {"method": _CONDITIONAL, "teacher_steps": 8, **_LORA},
    ],
    "lcm": [{"method": {"name": "lcm"}, "guidance": 4.0}],
    "lcm-lora": [{"method": {"name": "lcm"}, "guidance": 4.0, **_LORA}],
    "add": [{"method": {"name": "add"}, "guidance": 2.0}],
    "ladd": [{"method": {"name": "ladd", "low_noise_iterations": 1}}],
    "dmd2": [{"method": _DMD2, "guidance": 2.0}],
    "dmd2-lora": [{"method": _DMD2, **_LORA}],
}
"""The stages of every kind of distillation: method, full or LoRA, alone or handed on."""

PARTS: dict[str, dict[str, Any]] = {
    "vae": {"num_pictures": 4, "crop_pixels": 16},
    "text": {},
    "teacher": {"variants": 1, "autoencoder": str(MODEL), "text_encoders": str(MODEL)},
    "tune": {"variants": 1, "model": str(MODEL), "name": "tuned"},
    "control": {"variants": 1, "model": str(MODEL)},
    "style": {"variants": 1, "model": str(MODEL), "style": "noto"},
    "judge": {"channels": [8, 8], "num_held_out": 1},
}
"""Recipes of pretraining, beside size and loop."""

TINY = ModelSize(
    name="tiny",
    pixels=16,
    latent_channels=4,
    vae_channels=(4, 4, 4),
    encoder_blocks=(1, 1, 1),
    decoder_blocks=(1, 1, 1),
    unet_channels=(32, 32),
    unet_heads=(1, 2),
    unet_layers=1,
    transformer_layers=(1, 1),
    norm_groups=16,
    text_widths=(8, 16),
    text_layers=(1, 2),
    text_heads=2,
    max_tokens=20,
    time_id_width=4,
)
"""An SDXL of a few ten thousand parameters that draws 16x16 pictures."""

_LOOP = {
    "iterations": 4,
    "batch_size": 2,
    "learning_rate": 1e-4,
    "warmup_iterations": 0,
    "checkpoint_every": 2,
    "log_every": 1,
    "precision": "fp32",
    "ema_decay": 0.5,
}

_NOT_COMPARED = {"log.jsonl", "report.html", "run.lock", ".lock"}
"""The log has times, as its page has, and is compared line by line; locks are empty."""

_WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
"""What Python says of operations that change a folder, beside "open"."""


class Noise:
    """Latents of noise, with one caption."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def draw(
        self, count: int, tensors: torch.Generator, words: object
    ) -> tuple[torch.Tensor, Conditioning]:
        latents = torch.randn(count, 4, 4, 4, generator=tensors)
        return latents, self.bundle.text.conditioning(["a red fox"] * count, 16, 16)

    def empty(self, like: Conditioning) -> Conditioning:
        return self.bundle.text.conditioning([""], 16, 16).expand(len(like))


def tiny_teacher() -> Bundle:
    """Return a teacher with random weights that draws in two steps."""
    teacher = random_bundle(size=TINY)
    return replace(teacher, contract=replace(teacher.contract, steps=2))


def prepare(folder: Path) -> None:
    """Write what the kinds read beside the folders that they work in."""
    save_bundle(tiny_teacher(), folder / "model")
    whole = with_sdxl_vae(tiny_teacher())
    save_bundle(whole, folder / "whole")
    convert(str(folder / "whole"), "single-file", folder / "whole.safetensors")
    tensors, details = write_lora(random_lora(whole), dict(whole.parts), "peft")
    save_file(tensors, folder / "lora.safetensors", details)
    for kind, values in PARTS.items():
        shared = {"part": kind, "loop": _LOOP, "size": TINY.name, "device": "cpu"}
        (folder / f"{kind}.toml").write_text(tomli_w.dumps(shared | values))
    (folder / "pictures").mkdir()
    for number in range(6):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 256, (16, 16 + 8 * (number % 2), 3), np.uint8)
        path = folder / "pictures" / f"{number}.png"
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"a red fox {number}")


def _distil(kind: str) -> None:
    teacher = tiny_teacher()
    stages = [{"student_steps": 4, **stage} for stage in STAGES[kind]]
    recipe = DistillRecipe.model_validate(
        {
            "sample_prompts": ["a red fox"],
            "defaults": _LOOP,
            "stages": stages,
            "release": [4],
            "device": "cpu",
        }
    )
    folder = RunFolder(Path("run"), recipe)
    distil(recipe, teacher, Noise(teacher), folder, version="0", recipe_name="test")


def _pretrain(kind: str) -> None:
    SIZES[TINY.name] = TINY
    load_part(Path("..") / f"{kind}.toml").train(_drawings(), Path("run"))


def _drawings() -> DrawingSet:
    drawings = load_drawings(SAMPLE)
    return replace(drawings, drawings=drawings.drawings[:2], concepts=drawings.concepts[:2])


def _cache_pictures() -> None:
    entries = find_entries(str(PICTURES))
    cache_pictures(entries, load_bundle(MODEL), Path("cache"), sizes=[(16, 16), (24, 16)])


def _cache_prompts() -> None:
    prompts = [f"a red fox {number}" for number in range(6)]
    cache_prompts(prompts, load_bundle(MODEL), Path("cache"), per_prompt=2, batch_size=4)


def _export() -> None:
    export(WHOLE, "diffusers", Path("folder"))
    export(WHOLE, "comfyui", Path("whole.safetensors"))
    export(WHOLE, "unet", Path("unet.safetensors"))
    export(LORA, "lora-kohya", Path("lora.safetensors"), base=str(WHOLE))


def _convert() -> None:
    for model, to, out in (
        (WHOLE.with_suffix(".safetensors"), "diffusers", Path("folder")),
        (WHOLE, "single-file", Path("whole.safetensors")),
        (LORA, "kohya", Path("lora.safetensors")),
    ):
        # What is there already it refuses to write again.
        if not out.exists():
            convert(str(model), to, out, base=str(WHOLE))


def _generate() -> None:
    result = generate(load_bundle(MODEL), Request("a red fox", steps=2, num_images=2))
    save_images(result, Path("pictures"))


def _report() -> None:
    _distil("regression")
    write_report(Path("run"))


WORK: dict[str, Callable[[], None]] = {
    "cache-pictures": _cache_pictures,
    "cache-prompts": _cache_prompts,
    "export": _export,
    "generate": _generate,
    "convert": _convert,
    "report": _report,
    "drawings": lambda: save_drawings(_drawings(), Path("drawings")),
}
"""What writes beside training."""

KINDS = (*STAGES, *PARTS, *WORK)


def work(kind: str, out: Path) -> None:
    """Do the work of a kind in a folder, or go on there."""
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    os.chdir(out)
    if kind in STAGES:
        _distil(kind)
    elif kind in PARTS:
        _pretrain(kind)
    else:
        WORK[kind]()


@dataclass(frozen=True)
class Death:
    """When a process is killed.

    Args:
        seconds: after its start; None for never.
        operation: before which of its operations on files, counted from 1; None for never.
    """

    seconds: float | None = None
    operation: int | None = None


class Killed:
    """One kind of work, done once without interruption, and then under fire.

    Attributes:
        seconds: that the uninterrupted work took.
        num_operations: on files, of the uninterrupted work.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        """Do the work once.

        Args:
            kind: one of `KINDS`.
            folder: with what `prepare` wrote; takes the folders that are worked in.
        """
        self.kind = kind
        self.folder = folder
        self._whole = folder / f"{kind}-whole"
        begun_at = time.monotonic()
        assert self.run(self._whole), self.said(self._whole)
        self.seconds = time.monotonic() - begun_at
        self.num_operations = int(self._counter(self._whole).read_text())

    def run(self, out: Path, death: Death | None = None) -> bool:
        """Start one process, and return whether it lived to the end of the work."""
        death = death or Death()
        process: ForkServerProcess = FORKS.Process(
            target=_work_and_die,
            args=(self.kind, out, self._counter(out), out.with_suffix(".txt"), death.operation),
            daemon=True,
        )
        process.start()
        process.join(death.seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.said(out)
        return process.exitcode == 0

    def under_fire(self, num_kills: int, luck: random.Random) -> None:
        """Kill it so many times; whenever it gets through, compare, and begin in a new folder.

        Half of the times the moment is random, and half of them it is one of the operations.

        Raises:
            AssertionError: what it left is not what the uninterrupted work left.
        """
        num_killed = 0
        num_finished = 0
        deaths: list[Death] = []
        while num_killed < num_kills or deaths:
            out = self.folder / f"{self.kind}-{num_finished}"
            death = Death()
            if num_killed < num_kills and luck.random() < 0.5:
                death = Death(seconds=luck.uniform(0, self.seconds))
            elif num_killed < num_kills:
                death = Death(operation=luck.randint(1, self.num_operations))
            if not self.run(out, death):
                num_killed += 1
                deaths.append(death)
                continue
            self.compare(out, deaths)
            num_finished += 1
            deaths = []

    def compare(self, out: Path, deaths: list[Death]) -> None:
        """Compare a finished folder with the uninterrupted one."""
        expected = contents(self._whole)
        found = contents(out)
        differing = found.keys() ^ expected.keys()
        differing |= {name for name in found.keys() & expected if found[name] != expected[name]}
        assert differing == set(), (sorted(differing), deaths)
        figures = figures_of(out)
        for moment, values in figures_of(self._whole).items():
            assert figures[moment] == values, (moment, figures[moment], values, deaths)

    def said(self, out: Path) -> str:
        """Return what the last processes in a folder printed."""
        path = out.with_suffix(".txt")
        return path.read_text() if path.exists() else ""

    def _counter(self, out: Path) -> Path:
        return out.with_suffix(".count")


def _work_and_die(kind: str, out: Path, counter: Path, said: Path, operation: int | None) -> None:
    """Work in a process of its own, which ends itself before one of its operations on files."""
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    num_done = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal num_done
        if not _changes_files(event, arguments, out):
            return
        num_done += 1
        if num_done == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    try:
        work(kind, out)
    except BaseException:
        traceback.print_exc()
        raise
    counter.write_text(str(num_done))


def _changes_files(event: str, arguments: tuple[Any, ...], out: Path) -> bool:
    """Tell whether an event of Python's audit is about to change what is in a folder."""
    if event != "open" and event not in _WRITING:
        return False
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(str(out)):
        return False
    if event != "open":
        return True
    flags = arguments[2] or 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def contents(out: Path) -> dict[str, bytes | None]:
    """Return everything in a folder but what tells the time; None for folders."""
    return {
        str(path.relative_to(out)): _content(path) if path.is_file() else None
        for path in sorted(out.rglob("*"))
        if path.name not in _NOT_COMPARED
    }


def _content(path: Path) -> bytes:
    """Return the bytes of a file, the header of safetensors with its keys in order.

    The library writes metadata in an order that is another one in every process.
    """
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return json.dumps(header, sort_keys=True).encode() + data[end:]


def figures_of(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the figures of every iteration; of one that was done twice, both must be equal."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    log = out / "run" / "log.jsonl"
    for text in log.read_text().splitlines() if log.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # half a line, of a process that was killed while it wrote
        if "iteration" not in line:
            continue
        of_iteration = found.setdefault((line["part"], line["iteration"]), {})
        for key in line.keys() - CLOCKS:
            assert of_iteration.setdefault(key, line[key]) == line[key], (text, of_iteration)
    return found


def begin_in_words(
    kind: str, out: Path, said: Path, *, door: Barrier | None = None
) -> ForkServerProcess:
    """Start a process that works in a folder, and prints what it refuses as the last line.

    It ends with 1 then, and with 2 after anything that is not told in words. Processes that share a
    door come to their first lock together, and leave it together.
    """
    said.unlink(missing_ok=True)
    process: ForkServerProcess = FORKS.Process(
        target=_work_in_words, args=(kind, out, said, door), daemon=True
    )
    process.start()
    return process


def _meet_at(door: Barrier) -> None:
    """Let this process wait for the others before its first lock, and after it."""
    acquire = FileLock.acquire

    def acquire_together(lock: FileLock, *arguments: Any, **options: Any) -> Any:
        FileLock.acquire = acquire
        door.wait()
        try:
            return lock.acquire(*arguments, **options)
        finally:
            door.wait()

    FileLock.acquire = acquire_together


def _work_in_words(kind: str, out: Path, said: Path, door: Barrier | None) -> None:
    with said.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if door is not None:
        _meet_at(door)
    try:
        work(kind, out)
    except TwostepError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)
    except BaseException:
        traceback.print_exc()
        sys.exit(2)
