"""One drawing from a recording, for `full_size_compare.py`: seconds and peak of memory, as JSON.

    python benchmarks/recorded_draw.py '{"prompt": "a red apple", "engine": "openvino", "steps": 2}'

It imports nothing but what such a drawing needs.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from twostep.pipeline.recorded import draw_recorded, key_of
from twostep.pipeline.recordings import open_recording
from twostep.pipeline.request import Request


def main() -> None:
    """Draw what the command line asks for."""
    request = Request(**json.loads(sys.argv[1]))
    start = time.perf_counter()
    opened = open_recording(key_of(request))
    result = None if opened is None else draw_recorded(opened, request)
    if result is None:
        raise SystemExit(f"nothing is recorded for {request}")
    whole = time.perf_counter() - start
    stages = dict(result.seconds)
    loading = stages.pop("load")
    found = {
        # Networks are opened once, and then draw as often as is wanted.
        "seconds": sum(stages.values()),
        "stages": stages,
        "making": loading,
        "first": whole,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "least": None,
        "loads PyTorch": "torch" in sys.modules,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
