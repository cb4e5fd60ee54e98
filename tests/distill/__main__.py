"""Kills some kinds of work, or all, as often as is asked for: `tests.distill.killing`."""

import argparse
import random
import tempfile
import time
from pathlib import Path

from .killing import KINDS, Killed, prepare


def main() -> None:
    """Kill some kinds, or all, as often as is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.distill", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**20))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for kind in arguments.kinds or KINDS:
            begun_at = time.monotonic()
            outcome = "right"
            try:
                killed = Killed(kind, folder)
                killed.under_fire(arguments.kills, random.Random(f"{arguments.seed} {kind}"))
            except AssertionError as error:
                outcome = f"WRONG: {error}"
            seconds = time.monotonic() - begun_at
            print(
                f"{kind}, {arguments.kills} kills, seed {arguments.seed}, {seconds:.0f} s: "
                f"{outcome}",
                flush=True,
            )


if __name__ == "__main__":
    main()
