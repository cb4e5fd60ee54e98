"""What files of media carry beside the medium: JSON in a comment, which may be somebody else's."""

import json
from typing import Any


def object_in(comment: str) -> dict[str, Any]:
    """Return the JSON object that a comment is; an empty one for anything else."""
    try:
        values = json.loads(comment)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
