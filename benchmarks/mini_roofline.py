"""Which share of a device's arithmetic mini's teacher uses while it trains.

    python benchmarks/mini_roofline.py                          # on a GPU, 2 to 3 minutes
    python benchmarks/mini_roofline.py --device cpu --batch 4 --iterations 4 --variants contiguous

The very loop of `twostep pretrain mini-teacher` runs on random latents and captions, so neither
data nor weights are needed. Work is what torch counts in matrix products, convolutions and
attention, forward and backward; the peak is the device's dense bfloat16 rate by its data sheet, and
beside it stands what one large product of matrices reaches. `waits` are moments, in the timed
iterations, in which Python had to wait for the GPU: one for every line of the log is right.
`--profile` prints what takes the time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from twostep.files import write_atomically
from twostep.pretrain.encoded_scenes import EncodedScenes
from twostep.pretrain.joint import JointSettings, Loss, train_joint
from twostep.pretrain.model import TEST_CORPUS, random_bundle
from twostep.pretrain.scenes import random_scenes
from twostep.pretrain.sizes import MINI, ModelSize
from twostep.reports.speed import rate
from twostep.training.device import find_device
from twostep.training.loop import Randomness
from twostep.training.run_folder import RunFolder
from twostep.training.run_log import read_log

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second by what a device's name contains, of the data sheets."""

NUM_SCENES = 2048
SHARE_ASKED = 0.25


def settings_of(options: argparse.Namespace, variant: str) -> JointSettings:
    """Return the teacher's settings, for a few iterations."""
    return JointSettings.model_validate(
        {
            "size": "mini",
            "device": options.device,
            "compile": variant == "compiled",
            "loop": {
                "iterations": options.iterations,
                "batch_size": options.batch,
                "learning_rate": 1e-4,
                "warmup_iterations": 1,
                "log_every": max(1, options.iterations // 4),
                "checkpoint_every": 10**9,
            },
        }
    )


def random_encoded_scenes(size: ModelSize, vocabulary: int, device: torch.device) -> EncodedScenes:
    """Return noise in the shapes of latents, and captions of random tokens."""
    shape = (size.latent_channels, size.latent_pixels, size.latent_pixels)
    return EncodedScenes(
        torch.randn(NUM_SCENES, *shape).half().to(device),
        torch.randint(vocabulary, (NUM_SCENES, 3, size.max_tokens)).short().to(device),
        random_scenes(10, 4, count=NUM_SCENES, seed=0).to(device),
    )


def flops_of_example(size: ModelSize = MINI) -> float:
    """Return the operations of one example of the teacher's training, forward and backward."""
    teacher = random_bundle(size=size)
    networks = torch.nn.ModuleDict(teacher.parts).requires_grad_(True)
    vocabulary = len(teacher.text.tokenizers[0])  # type: ignore[attr-defined]
    scenes = random_encoded_scenes(size, vocabulary, torch.device("cpu"))
    num_examples = 2
    loop = {"iterations": 1, "batch_size": num_examples, "learning_rate": 1e-4}
    loss = Loss(teacher, scenes, JointSettings.model_validate({"loop": loop}))
    with FlopCounterMode(display=False) as counter:
        loss(0, Randomness.at(0, 0)).backward()
    networks.zero_grad()
    return float(counter.get_total_flops()) / num_examples


def train(options: argparse.Namespace, variant: str, folder: Path) -> dict[str, Any]:
    """Train for some iterations and return seconds of one, memory and waits.

    The first quarter is not timed.
    """
    settings = settings_of(options, variant)
    device = find_device(options.device)
    torch.manual_seed(0)
    teacher = random_bundle(corpus=(TEST_CORPUS,), size=MINI).to(device)
    if variant == "channels-last":
        teacher.denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vocabulary = len(teacher.text.tokenizers[0])  # type: ignore[attr-defined]
    scenes = random_encoded_scenes(MINI, vocabulary, device)
    begun = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")

        def on_iteration(num_done: int, figures: dict[str, float]) -> None:
            if device.type == "cuda" and num_done == settings.loop.log_every:
                torch.cuda.set_sync_debug_mode("warn")
                told.clear()

        train_joint(
            teacher, scenes, settings, RunFolder(folder, settings), on_iteration=on_iteration
        )
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(each.message) for each in told)
    lines, _ = read_log(folder / "log.jsonl")
    first, last = lines[0], lines[-1]
    seconds = (last["time"] - first["time"]) / (last["iteration"] - first["iteration"])
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    whole = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "seconds_at_first": whole - seconds * settings.loop.iterations,
        "waits": waits,
        "gib": peak,
    }


def print_profile(options: argparse.Namespace, variant: str, folder: Path) -> None:
    """Print what a few iterations spend their time with on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        train(options, variant, folder)
    averages = profiled.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=25), flush=True)


def main() -> None:
    """Measure every variant and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument(
        "--variants",
        default="contiguous,channels-last,compiled",
        help="how the UNet's weights lie without compiling, and compiled blocks",
    )
    parser.add_argument("--peak", type=float, help="dense bfloat16 operations a second")
    parser.add_argument("--profile", action="store_true", help="where the time of the last goes")
    parser.add_argument("--out", type=Path, default=Path("runs/mini-roofline.json"))
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = find_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    flops = flops_of_example()
    reached = rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    known = [peak for word, peak in PEAKS.items() if word in name]
    peak = options.peak or (known[0] if known else reached)
    print(f"{name}, torch {torch.__version__}: {flops / 1e9:.1f} GFLOP an example")
    print(f"peak {peak / 1e12:.2f} TFLOP/s; one large product reaches {reached / 1e12:.2f}")
    rows = []
    for variant in options.variants.split(","):
        with tempfile.TemporaryDirectory() as folder:
            figures = train(options, variant, Path(folder) / variant)
        done = flops * options.batch / figures["seconds"]
        row = {
            "variant": variant,
            "batch": options.batch,
            **figures,
            "examples_per_second": options.batch / figures["seconds"],
            "share_of_peak": done / peak,
            "share_of_product": done / reached,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        with write_atomically(options.out) as file:
            file.write(json.dumps({"device": name, "flops": flops, "rows": rows}).encode())
    best = max(row["share_of_peak"] for row in rows)
    verdict = "at least" if best >= SHARE_ASKED else "less than"
    print(f"best {best:.1%} of the peak, {verdict} the {SHARE_ASKED:.0%} that are asked")
    if options.profile:
        with tempfile.TemporaryDirectory() as folder:
            print_profile(options, rows[-1]["variant"], Path(folder) / "profile")


if __name__ == "__main__":
    main()
