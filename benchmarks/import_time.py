"""How long `import twostep` takes in a fresh process, against a budget of 300 ms.

It prints the best and the median of ten processes, in milliseconds. Run it as
`python benchmarks/import_time.py`; it exits with 1 if the best is over the budget.
"""

import statistics
import subprocess
import sys

NUM_RUNS = 10
BUDGET_MILLISECONDS = 300.0
CODE = """
import time
start = time.perf_counter()
import twostep
print(1000 * (time.perf_counter() - start))
"""


def measure_import() -> float:
    """Time one import in a process of its own, in milliseconds, without the start of Python."""
    process = subprocess.run(
        [sys.executable, "-c", CODE], check=True, capture_output=True, text=True
    )
    return float(process.stdout)


def main() -> int:
    """Print the figures and return the exit status."""
    measure_import()
    times = sorted(measure_import() for _ in range(NUM_RUNS))
    median = statistics.median(times)
    print(f"import twostep: best {times[0]:.1f} ms, median {median:.1f} ms of {NUM_RUNS} runs")
    print(f"budget: {BUDGET_MILLISECONDS:.0f} ms")
    return int(times[0] > BUDGET_MILLISECONDS)


if __name__ == "__main__":
    sys.exit(main())
