"""What was measured once on this machine and need not be measured again, in small files of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress

from twostep.engines.blobs import blob_folder, fingerprint
from twostep.files import WriteError, write_atomically


def measured_once(
    facts: Mapping[str, object], measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Return figures that depend on facts, from the disk if they were measured before.

    Args:
        facts: Everything that the figures depend on.
        measure: Returns them; called where there are none, or none that can be read.
    """
    path = blob_folder() / f"{fingerprint(facts)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {str(name): float(value) for name, value in figures.items()}
    figures = measure()
    text = json.dumps({"facts": dict(facts), "figures": figures}, indent=2, default=str)
    # Where nothing can be kept it is measured again the next time.
    with suppress(WriteError), write_atomically(path) as file:
        file.write(text.encode())
    return figures
