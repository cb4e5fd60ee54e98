"""What a batch that several requests share costs, beside ordinary batches and one by one.

    python benchmarks/shared_batches.py [--steps 2] [--rounds 5]

Processor time of one thread in milliseconds an image, for the built-in model, all of a drawing
included. "one by one" draws every request by itself. "shared" gives them to `Studio.submit`, whose
pixels are checked to be the same. "ordinary" is one request of as many images, which shares more:
its text is encoded once, and its pixels may differ in the last bit from those of single images.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from twostep.pipeline.request import Request, Result
from twostep.pipeline.studio import Studio

PROMPT = "a 3d red apple on a blue background"
BATCHES = (2, 4, 8, 16)


def measure(work: Callable[[], object], num_images: int) -> float:
    """Return the processor time of some work in milliseconds an image."""
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start) / num_images


def check_pixels(studio: Studio, requests: list[Request]) -> None:
    """Stop if requests that share a batch have other pixels than one by one."""
    for request, answer in zip(requests, studio.submit(requests), strict=True):
        assert isinstance(answer, Result), answer
        alone = studio.draw(request)
        assert answer.images[0].tobytes() == alone.images[0].tobytes(), request


def main() -> None:
    """Print the medians for every size of a batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    studio = Studio("cpu")
    print(f"{'images':>6} {'one by one':>10} {'shared':>10} {'ordinary':>10}")
    for count in BATCHES:
        requests = [Request(PROMPT, seed=seed, steps=arguments.steps) for seed in range(count)]
        together = Request(PROMPT, num_images=count, steps=arguments.steps)
        check_pixels(studio, requests)
        ways = {
            "one by one": lambda requests=requests: [studio.draw(each) for each in requests],
            "shared": lambda requests=requests: studio.submit(requests),
            "ordinary": lambda together=together: studio.draw(together),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.rounds):
            for way, work in ways.items():
                times[way].append(measure(work, count))
        medians = [statistics.median(times[way]) for way in ways]
        print(f"{count:6} " + " ".join(f"{median:10.1f}" for median in medians))


if __name__ == "__main__":
    main()
