"""Requests that no client should send: odd bodies, damaged pictures, bombs, and broken forms."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import random
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from itertools import islice

from PIL import Image

JSON_PATHS = (
    "/v1/images/generations",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/options",
    "/sdapi/v1/png-info",
    "/api/v1/jobs",
)
PICTURE_BODIES: tuple[tuple[str, Callable[[str], dict[str, object]]], ...] = (
    ("/sdapi/v1/img2img", lambda text: {"prompt": "x", "steps": 1, "init_images": [text]}),
    ("/sdapi/v1/png-info", lambda text: {"image": text}),
    ("/api/v1/jobs", lambda text: {"prompt": "x", "steps": 1, "image": text}),
    ("/api/v1/jobs", lambda text: {"prompt": "x", "steps": 1, "image": good(), "mask": text}),
)


@dataclass(frozen=True)
class Malformed:
    """A request as it is sent: where to, what it is said to be, and the bytes."""

    kind: str
    path: str
    content_type: str
    content: bytes


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """Return a picture as a file."""
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@cache
def good() -> str:
    """Return a picture as it should be, in base64."""
    return base64.b64encode(saved(Image.new("RGB", (64, 64), "white"))).decode()


def requests(dice: random.Random) -> Iterator[Malformed]:
    """Yield malformed requests without an end, of every kind in turn."""
    while True:
        yield _odd_json(dice)
        yield _odd_picture(dice)
        yield _odd_form(dice)
        yield _damaged_picture(dice)


def attack(address: str, count: int, seed: int) -> Counter[str]:
    """Send so many malformed requests, and return how often each status was answered.

    "closed" counts those whose connection was closed while they were sent. Raises AssertionError
    for an answer of 5xx.
    """
    host, port = address.removeprefix("http://").split(":")
    answered: Counter[str] = Counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=120)
    for one in islice(requests(random.Random(seed)), count):
        headers = {"Content-Type": one.content_type.encode("latin-1")}
        try:
            connection.request("POST", one.path, one.content, headers)
            response = connection.getresponse()
            text = response.read()
        except (ConnectionError, http.client.HTTPException):
            answered["closed"] += 1
            connection.close()
            continue
        assert response.status < 500, (one.kind, one.path, response.status, text[:300])
        answered[str(response.status)] += 1
    connection.close()
    return answered


def hang_up(address: str, count: int, seed: int) -> None:
    """Connect so often, and leave at a random moment: before, within or after a request."""
    dice = random.Random(seed)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "steps": 1, "stream": True, "partial_images": 3}).encode()
    for _ in range(count):
        path = dice.choice(["/v1/images/generations", "/sdapi/v1/txt2img"])
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(request[: dice.choice([0, 10, 100, len(request)])])


def _odd_json(dice: random.Random) -> Malformed:
    bodies: dict[str, Callable[[], bytes]] = {
        "nothing": lambda: b"",
        "no JSON": lambda: bytes(dice.randbytes(dice.randrange(1, 2000))),
        "cut": lambda: json.dumps({"prompt": "x" * 500}).encode()[: dice.randrange(1, 500)],
        "deep lists": lambda: b"[" * 100_000,
        "deep and closed": lambda: b"[" * 5_000 + b"]" * 5_000,
        "deep objects": lambda: b'{"prompt":' * 50_000 + b"1" + b"}" * 50_000,
        "deep inside": lambda: b'{"prompt": "x", "loras": ' + b"[" * 900 + b"]" * 900 + b"}",
        "a number of many digits": lambda: b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
        "an exponent": lambda: b'{"prompt": "x", "guidance_scale": 1e400, "steps": 1e9}',
        "many keys": lambda: json.dumps({f"key {i}": i for i in range(20_000)}).encode(),
        "keys twice": lambda: b'{"prompt": "x", "prompt": 1, "prompt": null}',
        "a long prompt": lambda: json.dumps({"prompt": "x " * 200_000}).encode(),
        "UTF-16": lambda: json.dumps({"prompt": ""}).encode("utf-16"),
        "UTF-32": lambda: json.dumps({"prompt": ""}).encode("utf-32"),
        "Latin-1": lambda: '{"prompt": "é"}'.encode("latin-1"),
        "a mark of order": lambda: b'\xef\xbb\xbf{"prompt": ""}',
        "half letters": lambda: b'{"prompt": "\\ud83d", "model": "\\udc00"}',
        "overlong letters": lambda: b'{"prompt": "\xc0\xaf\xed\xa0\x80"}',
        "zeros": lambda: b"\0" * 5_000,
        "zeros inside": lambda: b'{"prompt": "\\u0000", "model": "\\u0000"}',
        "gzip": lambda: gzip.compress(b'{"prompt": ""}'),
        "values of no JSON": lambda: b'{"prompt": "x", "seed": NaN, "steps": Infinity}',
        "wrong types": lambda: json.dumps(
            {"prompt": dice.choice([1, [], {}, True, None, 1.5]), "steps": "x", "seed": []}
        ).encode(),
        "a list of many": lambda: b'{"prompt": "x", "init_images": [' + b'"",' * 50_000 + b'""]}',
        "control characters that are told back": lambda: json.dumps(
            {"prompt": "x", "steps": 1, "model": "\x11\x00\x7f", "scheduler": "\x01\x9b"}
        ).encode(),
        "weights without an end": lambda: json.dumps({"prompt": "(" * 2_000, "steps": 99}).encode(),
    }
    kind = dice.choice(list(bodies))
    types = ("application/json",) * 3 + ("text/plain", "application/json; charset=utf-16", "")
    return Malformed(kind, dice.choice(JSON_PATHS), dice.choice(types), bodies[kind]())


@cache
def _pictures() -> dict[str, bytes]:
    """Return files that are pictures of a kind that is rare, dangerous or none at all."""
    small = Image.new("RGB", (64, 64), "red")
    frames = [Image.new("P", (64, 64), i) for i in range(4)]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "a bomb of bits": saved(Image.new("1", (30_000, 30_000))),
        "a bomb by its header": _png(60_000, 60_000, b""),
        "a bomb of text": _png(8, 8, zlib.compress(bytes(8 * 25)), text=bytes(30_000_000)),
        "zeros where pixels should be": _png(64, 64, zlib.compress(b"")),
        "more pixels than said": _png(8, 8, zlib.compress(bytes(20_000_000))),
        "no pixels at all": _png(0, 0, b""),
        "one pixel": saved(Image.new("RGB", (1, 1))),
        "a line": saved(Image.new("L", (3_000, 1))),
        "a moving GIF": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "a moving PNG": saved(small, "PNG", save_all=True, append_images=[small.copy()]),
        "a TIFF": saved(small, "TIFF"),
        "an ICO": saved(small, "ICO"),
        "a BMP": saved(small, "BMP"),
        "a PDF": saved(small, "PDF"),
        "a TGA": saved(small, "TGA"),
        "CMYK": saved(small.convert("CMYK"), "JPEG"),
        "16 bits": saved(Image.new("I;16", (64, 64), 40_000)),
        "a palette with holes": saved(small.convert("P"), "PNG", transparency=0),
        "turned": saved(small, "JPEG", exif=exif),
        "a broken profile": saved(small, "PNG", icc_profile=b"\0" * 100),
        "an SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "a script": b"#!/bin/sh\ntouch /tmp/pwned\n",
        "a pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",
        "nothing": b"",
    }


def _odd_picture(dice: random.Random) -> Malformed:
    kind, data = dice.choice(list(_pictures().items()))
    return _with_picture(kind, data, dice)


def _damaged_picture(dice: random.Random) -> Malformed:
    format = dice.choice(["PNG", "JPEG", "WEBP", "GIF"])
    size = dice.choice([(64, 64), (1, 1), (7, 900), (500, 500)])
    return _with_picture(f"a damaged {format}", damaged(_noise(size, format), dice), dice)


@cache
def _noise(size: tuple[int, int], format: str) -> bytes:
    return saved(Image.effect_noise(size, 60).convert("RGB"), format)


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Return a file that is cut, with some of its bytes replaced."""
    data = data[: dice.randrange(len(data) + 1)] if dice.random() < 0.5 else data
    changed = bytearray(data)
    for _ in range(dice.randrange(8)):
        if changed:
            changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def _with_picture(kind: str, data: bytes, dice: random.Random) -> Malformed:
    """Put a file where pictures go in, as base64 or as a part of a form."""
    if dice.random() < 0.3:
        name = dice.choice(["image", "image[]", "mask"])
        parts = [_part("prompt", b"x"), _part("steps", b"1"), _part(name, data, "a.png")]
        return Malformed(kind, "/v1/images/edits", FORM, _form(parts))
    path, body = dice.choice(PICTURE_BODIES)
    text = base64.b64encode(data).decode()
    if dice.random() < 0.2:
        text = dice.choice([f"data:image/png;base64,{text}", text[:-1], f"{text}\n", f" {text}"])
    content = json.dumps(body(text)).encode()
    return Malformed(kind, path, "application/json", content)


FORM = "multipart/form-data; boundary=x"


def _part(name: str, data: bytes, file: str | None = None, head: str = "") -> bytes:
    says = f'Content-Disposition: form-data; name="{name}"'
    if file is not None:
        says += f'; filename="{file}"'
    return f"--x\r\n{says}\r\n{head}\r\n".encode() + data + b"\r\n"


def _form(parts: list[bytes], end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(parts) + end


def _odd_form(dice: random.Random) -> Malformed:
    prompt = _part("prompt", b"x")
    image = _part("image", base64.b64decode(good()), "a.png")
    forms: dict[str, tuple[str, Callable[[], bytes]]] = {
        "no boundary": ("multipart/form-data", lambda: _form([prompt])),
        "an empty boundary": ("multipart/form-data; boundary=", lambda: _form([prompt])),
        "another boundary": ("multipart/form-data; boundary=y", lambda: _form([prompt, image])),
        "a boundary in no letters": ("multipart/form-data; boundary=\xff", lambda: _form([prompt])),
        "no end": (FORM, lambda: _form([prompt, image], end=b"")),
        "an end alone": (FORM, lambda: b"--x--\r\n"),
        "nothing": (FORM, lambda: b""),
        "cut": (FORM, lambda: _form([prompt, image])[: dice.randrange(200)]),
        "many fields": (FORM, lambda: _form([_part(f"n{i}", b"") for i in range(5_000)])),
        "many files": (FORM, lambda: _form([prompt, *[image] * 200])),
        "a field of megabytes": (FORM, lambda: _form([_part("prompt", b"x" * 3_000_000)])),
        "a name of megabytes": (FORM, lambda: _form([_part("n" * 1_000_000, b"x")])),
        "a header of megabytes": (FORM, lambda: _form([_part("a", b"", head="X: y" * 300_000)])),
        "no name": (FORM, lambda: b"--x\r\nContent-Disposition: form-data\r\n\r\nx\r\n--x--\r\n"),
        "no disposition": (FORM, lambda: b"--x\r\nContent-Type: a/b\r\n\r\nx\r\n--x--\r\n"),
        "names of a path": (FORM, lambda: _form([prompt, _part("image", b"x", "../../etc/x")])),
        "names with zeros": (FORM, lambda: _form([_part("im\0age", b"x", "a\0.png")])),
        "the prompt as a file": (FORM, lambda: _form([_part("prompt", b"x", "p.txt"), image])),
        "the image as text": (FORM, lambda: _form([prompt, _part("image", b"abc")])),
        "bytes that are no text": (FORM, lambda: _form([_part("prompt", b"\xff\xfe"), image])),
        "wrong numbers": (FORM, lambda: _form([prompt, image, _part("n", b"many")])),
        "an encoding of parts": (
            FORM,
            lambda: _form([_part("prompt", b"=FF", head="Content-Transfer-Encoding: base64\r\n")]),
        ),
        "a form in a form": (FORM, lambda: _form([_part("image", _form([prompt]), "a.png")])),
        "a form by its address": (
            "application/x-www-form-urlencoded",
            lambda: b"prompt=x&image=%ff%fe&n=1" + b"&a=b" * 5_000,
        ),
        "JSON": ("application/json", lambda: b'{"prompt": "x", "image": "x"}'),
    }
    kind = dice.choice(list(forms))
    content_type, make = forms[kind]
    return Malformed(f"form: {kind}", "/v1/images/edits", content_type, make())


def _png(width: int, height: int, pixels: bytes, text: bytes = b"") -> bytes:
    """Return a grey PNG that says this size, whatever its pixels hold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    texts = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text)) if text else b""
    end = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + texts + end
