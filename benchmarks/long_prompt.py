"""How long a prompt of 5,000 words with weights takes to encode on nano; wanted: under 2 s.

python benchmarks/long_prompt.py
"""

import time

import torch

from twostep.models.loading import load_bundle


def main() -> None:
    """Encode it once to warm up and five times more, and print the fastest."""
    bundle = load_bundle("nano")
    prompt = " ".join(["red", "apple", "(blue:1.2)", "dog", "house,"] * 1000)
    seconds = []
    torch.set_num_threads(1)
    for _ in range(6):
        start = time.process_time()
        bundle.text.encode_whole([prompt])
        seconds.append(time.process_time() - start)
    print(f"5,000 words: {min(seconds[1:]):.2f} s of processor time")


if __name__ == "__main__":
    main()
