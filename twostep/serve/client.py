"""A client of the server's own API: `twostep.Client`. Needs the extra `client`, and neither torch
nor a web framework.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from io import BytesIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from twostep.errors import TwostepError
from twostep.files import write_new
from twostep.pipeline.request import Picture, Request, RequestError
from twostep.serve.shapes import (
    CAPABILITIES_PATH,
    JOBS_PATH,
    SUFFIXES,
    UNKNOWN_SUFFIX,
    Capabilities,
    JobAnswer,
    JobState,
    file_stem,
)

try:
    import httpx2
except ModuleNotFoundError as missing:
    raise TwostepError("httpx2 is not installed. Run: pip install 'twostep[client]'.") from missing

_SENT = (
    "prompt",
    "num_images",
    "seed",
    "steps",
    "guidance",
    "negative_prompt",
    "width",
    "height",
    "strength",
    "sampler",
    "decoder",
    "frames",
    "model",
)
"""The fields of a request that are sent as they are."""

_ENCODED = ("image", "mask", "controls", "loras")
"""Those that are sent in another form. All others a server does not take."""


class ServerError(TwostepError):
    """What a server refused or could not do. `status` is its HTTP status, 0 if none came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Drawn:
    """What a job brought.

    - `files`: a file for each seed, which says how it was made: of pictures a PNG, of clips an
      animated WebP, of sounds a WAV.
    - `answer`: what the server said of it: checkpoint, steps, guidance, size, times and warnings.
    - `suffix`: the ending of the files' names.
    """

    files: list[bytes]
    seeds: list[int]
    answer: JobAnswer
    suffix: str = ".png"

    @property
    def images(self) -> list[Image.Image]:
        """The pictures, opened, and clips at their first frame; raises ServerError for sounds."""
        if self.answer.media not in ("image", "video"):
            raise ServerError(
                f"{self.answer.checkpoint} made no pictures but {self.suffix} files; take `files`, "
                "or `save` them."
            )
        return [Image.open(BytesIO(data)) for data in self.files]

    def save(self, folder: str | Path) -> list[Path]:
        """Write the files into a folder, as CHECKPOINT_SEED.png or with their own ending.

        The same item again keeps its file, another one by the same name gets a number. Returns the
        paths.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for seed, data in zip(self.seeds, self.files, strict=True):
            stem = file_stem(str(self.answer.checkpoint), seed)
            paths.append(write_new(_free_paths(folder, stem, self.suffix), data))
        return paths


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job: "queued", "step", or the state in which it ended.

    - `position`: of a queued job, how many are before it.
    - `num_done`, `num_steps`, `seeds`, `previews`: of a step, as in `twostep.serve.engine.Event`.
    """

    kind: str
    position: int = 0
    num_done: int = 0
    num_steps: int = 0
    seeds: tuple[int, ...] = ()
    previews: tuple[Image.Image, ...] = ()


class Client:
    """A connection to a `twostep serve`.

    Args:
        address: where it is.
        key: the key that it asks for, if it does.
        name: whose turn jobs take; by default the machine's.
        patience: for how many seconds a full queue is asked again.
        timeout: after how many seconds without a word from the server a call fails.

    A client may be used by several threads. It is closed by `close`, or as a context.
    """

    def __init__(
        self,
        address: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        name: str | None = None,
        patience: float = 60.0,
        timeout: float = 600.0,
    ) -> None:
        headers = {}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        if name is not None:
            headers["X-Twostep-Client"] = name
        limits = httpx2.Timeout(timeout, connect=10.0)
        self._http = httpx2.Client(base_url=address, headers=headers, timeout=limits)
        self._patience = patience

    def __enter__(self) -> Client:
        """Return the client itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; jobs go on."""
        self._http.close()

    def capabilities(self) -> Capabilities:
        """Return what can be asked for."""
        return Capabilities.model_validate_json(self._call("GET", CAPABILITIES_PATH).content)

    def draw(self, request: Request | str, *, seconds: float | None = None) -> Drawn:
        """Draw a request, or one picture of a prompt with the server's own model, and wait for it.

        Of a request `model`, `loras` and the models of `controls` are names on the server. Where
        the waiting is interrupted the job is cancelled.

        Args:
            request: what to draw.
            seconds: after how many the job fails if it is not done.

        Raises:
            RequestError: the request has what no server takes.
            ServerError: the server refused it, could not draw it, or is not there.
        """
        job = self.submit(request, seconds=seconds)
        try:
            return job.wait()
        except BaseException:
            job.cancel()
            raise

    def submit(
        self, request: Request | str, *, previews: bool = False, seconds: float | None = None
    ) -> RemoteJob:
        """Queue a request, and return its job at once; as `draw` does.

        With `previews` the events of its steps bring small pictures. A full queue is asked again,
        as long as there is patience.
        """
        body = _body_of(request)
        body |= {"previews": previews, "seconds": seconds}
        end = time.monotonic() + self._patience
        while True:
            answer = self._send("POST", JOBS_PATH, json=body)
            wait = float(answer.headers.get("Retry-After", 1))
            if answer.status_code != 429 or time.monotonic() + wait > end:
                break
            time.sleep(wait)
        _check(answer)
        return RemoteJob(self, JobAnswer.model_validate_json(answer.content))

    def job(self, job_id: str) -> RemoteJob:
        """Return a job of which one knows the id."""
        answer = self._call("GET", f"{JOBS_PATH}/{job_id}")
        return RemoteJob(self, JobAnswer.model_validate_json(answer.content))

    def _call(self, method: str, path: str) -> httpx2.Response:
        answer = self._send(method, path)
        _check(answer)
        return answer

    def _send(self, method: str, path: str, **values: Any) -> httpx2.Response:
        try:
            return self._http.request(method, path, **values)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx2.TransportError) -> ServerError:
        reason = str(error) or type(error).__name__
        return ServerError(
            f"{self._http.base_url} does not answer: {reason}. Is `twostep serve` running there?"
        )

    def _events(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the kinds and values of server-sent events."""
        try:
            with self._http.stream("GET", path) as answer:
                if answer.is_error:
                    answer.read()
                    _check(answer)
                kind = ""
                for line in answer.iter_lines():
                    name, _, value = line.partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        yield kind, json.loads(value)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error


class RemoteJob:
    """A job on a server. Made by `Client.submit` and `Client.job`."""

    def __init__(self, client: Client, answer: JobAnswer) -> None:
        self._client = client
        self._answer = answer

    @property
    def id(self) -> str:
        """The job's name on the server."""
        return self._answer.id

    @property
    def seed(self) -> int:
        """The seed of its first picture."""
        return self._answer.seed

    def state(self) -> JobState:
        """Ask how the job stands."""
        self._refresh()
        return self._answer.state

    def events(self) -> Iterator[JobEvent]:
        """Yield what has happened to the job, and what happens until it ends."""
        for kind, values in self._client._events(self._answer.events):
            previews = [
                Image.open(BytesIO(base64.b64decode(text))) for text in values.get("previews", [])
            ]
            yield JobEvent(
                kind,
                position=values.get("position", 0),
                num_done=values.get("num_done", 0),
                num_steps=values.get("num_steps", 0),
                seeds=tuple(values.get("seeds") or ()),
                previews=tuple(previews),
            )

    def wait(self) -> Drawn:
        """Wait until the job ends, and return what it brought.

        Raises ServerError if it failed or was cancelled.
        """
        for _ in self.events():
            pass
        self._refresh()
        answer = self._answer
        if answer.state != "done" or answer.images is None or answer.seeds is None:
            raise ServerError(answer.error or f"the job is {answer.state}.")
        files = [self._client._call("GET", path) for path in answer.images]
        kind = files[0].headers.get("Content-Type", "")
        suffix = SUFFIXES.get(kind, UNKNOWN_SUFFIX)
        return Drawn([file.content for file in files], answer.seeds, answer, suffix)

    def cancel(self) -> None:
        """End the job; one that has ended stays as it is."""
        self._client._call("DELETE", f"{JOBS_PATH}/{self.id}")

    def _refresh(self) -> None:
        answer = self._client._call("GET", f"{JOBS_PATH}/{self.id}")
        self._answer = JobAnswer.model_validate_json(answer.content)


def _check(answer: httpx2.Response) -> None:
    """Raise ServerError with the server's own sentence for anything but success."""
    if answer.is_success:
        return
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {answer.status_code}: {answer.text[:200]!r}"
    raise ServerError(str(message), answer.status_code)


def _body_of(request: Request | str) -> dict[str, Any]:
    """Return a request as a server takes it; raises RequestError for what it does not take."""
    if isinstance(request, str):
        return {"prompt": request}
    usual = Request("")
    for field in fields(Request):
        value = getattr(request, field.name)
        if field.name not in (*_SENT, *_ENCODED) and value != getattr(usual, field.name):
            raise RequestError(f"{field.name} is {value!r}; a server takes none. Leave it out.")
    body = {name: getattr(request, name) for name in _SENT}
    body["loras"] = [str(lora) for lora in request.loras]
    if request.image is not None:
        body["image"] = _encoded(request.image.image)
    if request.mask is not None:
        body["mask"] = _encoded(_with_alpha(request.mask))
    body["controls"] = [
        {
            "name": control.model,
            "picture": _encoded(control.picture.image),
            "scale": control.scale,
            "start": control.start,
            "end": control.end,
        }
        for control in request.controls
    ]
    return body


def _with_alpha(picture: Picture) -> Image.Image:
    """Return a mask with its transparency, by which it may be read."""
    image = picture.image.copy()
    if picture.alpha is not None:
        image.putalpha(picture.alpha)
    return image


def _free_paths(folder: Path, stem: str, suffix: str) -> Iterator[Path]:
    """Yield the names that a file may get: the stem, then with numbers."""
    yield folder / f"{stem}{suffix}"
    for number in count(2):
        yield folder / f"{stem}_{number}{suffix}"


def _encoded(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
