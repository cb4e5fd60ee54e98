"""Handing a drawing to a server of the same user on this machine, which has the model loaded.

The files that come back are those that this process would have written, byte for byte. Needs
neither torch nor a web framework.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from twostep.errors import TwostepError
from twostep.pipeline.order import Order
from twostep.pipeline.output import prepare_folder, stem_of, write_item
from twostep.serve.announcement import Announcement, announcements, is_switched_off

HANDOVER_PATH = "/local/v1/drawings"
"""Where a server takes drawings that are handed over; for programs of the same version alone."""

TOKEN_HEADER = "X-Twostep-Token"
"""The header with the token of the announcement."""

_SECONDS_TO_CONNECT = 2.0

_IMPOSSIBLE = 400
"""The status of what cannot be drawn anywhere."""


class HandedOverError(TwostepError):
    """What the server could not draw, in the words that this process would have had."""


@dataclass(frozen=True)
class HandedOver:
    """What a server drew.

    Args:
        address: of the server.
        files: for each item its seed, the ending of its file, and the file.
        prompt: what was drawn.
        checkpoint: the name in the contract that drew it.
        seconds: per stage.
        warnings: sentences for a person.
    """

    address: str
    files: list[tuple[int, str, bytes]]
    prompt: str
    checkpoint: str
    seconds: dict[str, float]
    warnings: list[str]

    def save(self, folder: Path) -> list[Path]:
        """Write the files as `pipeline.provenance.save_images` does, and return their paths."""
        folder = prepare_folder(folder)
        return [
            write_item(folder, stem_of(self.prompt, self.checkpoint, seed), data, suffix)
            for seed, suffix, data in self.files
        ]


def hand_over(order: Order, say: Callable[[str], None]) -> HandedOver | None:
    """Let a server of this user draw an order; None where there is none that does.

    Args:
        order: what is drawn.
        say: called with a line where a server is there and does not draw it.

    Raises HandedOverError for an order that cannot be drawn here either.
    """
    if is_switched_off():
        return None
    servers = announcements()
    if not servers:
        return None
    try:
        body = _body_of(order)
    except OSError:
        return None  # the pictures are not there, which is said where they are opened
    for path, server in servers:
        try:
            status, answer = _ask(server, body)
        except ConnectionRefusedError:
            # It was killed, and could not remove its file.
            with suppress(OSError):
                path.unlink()
            continue
        except (OSError, HTTPException, ValueError) as error:
            say(f"{server.address} does not answer ({error}): drawn here.")
            continue
        if status == 200:
            return _read(server.address, answer)
        message = str(answer.get("error", {}).get("message", f"status {status}"))
        if status == _IMPOSSIBLE:
            raise HandedOverError(message)
        say(f"{server.address} does not draw it ({message.rstrip('.')}): drawn here.")
    return None


def _body_of(order: Order) -> bytes:
    """Return what is sent: the order, where its model lies if that is here, the folder that names
    in it mean files of, if they do, and its pictures.
    """
    place = Path(order.model)
    values = {
        "order": order.to_json(),
        "model_path": str(place.resolve()) if place.exists() else None,
        "folder": os.getcwd() if order.depends_on_folder else None,
        "pictures": {
            path: base64.b64encode(Path(path).read_bytes()).decode() for path in order.pictures
        },
    }
    return json.dumps(values).encode()


def _ask(server: Announcement, body: bytes) -> tuple[int, dict[str, Any]]:
    """Send a body to a server, and wait for its answer as long as it takes."""
    address = urlsplit(server.address)
    connection = HTTPConnection(
        address.hostname or "", address.port or 80, timeout=_SECONDS_TO_CONNECT
    )
    headers = {"Content-Type": "application/json", TOKEN_HEADER: server.token}
    if server.key is not None:
        headers["Authorization"] = f"Bearer {server.key}"
    try:
        connection.connect()
        connection.sock.settimeout(None)  # there may be a queue
        connection.request("POST", HANDOVER_PATH, body, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    return response.status, answer if isinstance(answer, dict) else {}


def _read(address: str, answer: dict[str, Any]) -> HandedOver:
    return HandedOver(
        address=address,
        files=[
            (int(each["seed"]), str(each["suffix"]), base64.b64decode(each["data"]))
            for each in answer["files"]
        ],
        prompt=answer["prompt"],
        checkpoint=answer["checkpoint"],
        seconds=answer["seconds"],
        warnings=answer["warnings"],
    )
