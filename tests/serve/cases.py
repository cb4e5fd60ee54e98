"""Requests that Schemathesis makes of a server's own OpenAPI document, and what it checks."""

from __future__ import annotations

import base64
import math
import random
from collections import Counter
from io import BytesIO
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

from PIL import Image

# Schemathesis takes seconds to import.
if TYPE_CHECKING:
    from schemathesis import Case

MOST = {"steps": 2, "n": 1, "num_images": 2, "batch_size": 1, "n_iter": 1}
"""What is asked for no more of, so that thousands of cases take minutes."""


def _picture() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = _picture()


def try_document(address: str, count: int, seed: int) -> Counter[int]:
    """Send about so many cases, and return how often each status was answered.

    Half of the cases keep to the document, half break it. Raises what Schemathesis finds: answers
    of 5xx, and statuses, content types, headers and bodies that the document does not have.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode, errors
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_headers_conformance,
        response_schema_conformance,
    ]
    document = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    open_ended = [each for each in operations if each.body or each.path_parameters or each.query]
    share = math.ceil((count - len(operations)) / (2 * len(open_ended)))
    statuses: Counter[int] = Counter()
    dice = random.Random(seed)
    jobs: list[str] = []
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @seeded(seed)
            @settings(
                max_examples=share if operation in open_ended else 1,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Case) -> None:
                _shape(case, dice, jobs)
                answer = case.call_and_validate(checks=checks, timeout=60)
                statuses[answer.status_code] += 1
                if answer.status_code == 202:
                    jobs.append(answer.json()["id"])

            try:
                check()
            except (Unsatisfiable, SkipTest, errors.InvalidSchema):
                # What takes nothing cannot be given anything wrong.
                assert mode == GenerationMode.NEGATIVE, operation.label
    return statuses


def _shape(case: Case, dice: random.Random, jobs: list[str]) -> None:
    """Keep a case small, and give half of them pictures and jobs that are there."""
    if jobs and "job_id" in (case.path_parameters or {}) and dice.random() < 0.5:
        case.path_parameters["job_id"] = dice.choice(jobs[-20:])
    body: Any = case.body
    if not isinstance(body, dict):
        return
    for name, most in MOST.items():
        if isinstance(body.get(name), int) and body[name] > most:
            body[name] = most
    if dice.random() < 0.8:
        # The server's models draw pictures, and refuse frames.
        body.pop("frames", None)
    if dice.random() < 0.5:
        text = base64.b64encode(PICTURE).decode()
        pictures = {"init_images": [text], "mask": text}
        if case.media_type == "multipart/form-data":
            pictures = {"image": PICTURE, "mask": PICTURE}
        if case.path.endswith(("png-info", "jobs")):
            pictures |= {"image": text}
        body |= {name: value for name, value in pictures.items() if name in body}
