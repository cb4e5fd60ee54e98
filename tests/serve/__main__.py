"""The checks of the server that take long: as many cases, malformed requests or kills as wanted."""

import argparse
import random
import tempfile
import time
from pathlib import Path

from tests.serve.cases import try_document
from tests.serve.killing import under_fire
from tests.serve.malformed import attack
from tests.serve.processes import running


def cases(count: int, seed: int) -> str:
    """Send cases of the OpenAPI document."""
    with running() as server:
        return f"answered {dict(sorted(try_document(server.address, count, seed).items()))}"


def malformed(count: int, seed: int) -> str:
    """Send malformed requests."""
    with running() as server:
        return f"answered {dict(sorted(attack(server.address, count, seed).items()))}"


def kills(count: int, seed: int) -> str:
    """Kill a server that keeps its jobs in a file."""
    with tempfile.TemporaryDirectory() as folder:
        accepted = under_fire(Path(folder) / "jobs.sqlite", count, seed)
    return f"{len(accepted)} accepted jobs were drawn and reported once"


CHECKS = {"cases": (cases, 5_000), "malformed": (malformed, 2_000), "kills": (kills, 20)}


def main() -> None:
    """Run one check, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.serve", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--count", type=int, help="how many; else 5000, 2000 and 20")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**20))
    arguments = parser.parse_args()
    for name in arguments.checks or CHECKS:
        check, usual = CHECKS[name]
        count = arguments.count or usual
        start = time.monotonic()
        outcome = check(count, arguments.seed)
        seconds = time.monotonic() - start
        print(f"{count} {name}, seed {arguments.seed}, {seconds:.0f} s: {outcome}", flush=True)


if __name__ == "__main__":
    main()
