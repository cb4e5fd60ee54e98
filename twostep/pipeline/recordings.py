"""Recordings: which compiled networks draw the plain pictures of a model, and how.

Between the networks of a student that OpenVINO has compiled little is left to do for a plain
picture. What that is for a model, a number of steps and a size lies in a small file in the cache
folder, beside the networks themselves. Who reads it needs neither PyTorch nor the model's weights.

Nothing here brings libraries that take long to import, so that networks are being opened while
these are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twostep import __version__
from twostep.engines.blobs import Blob, fingerprint, restored
from twostep.files import WriteError, cache_folder, write_atomically
from twostep.models.runtime import say, take_notes
from twostep.training.cpu import num_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

ENGINES = ("openvino", "openvino-bf16", "openvino-int8")
"""The engines of the recordings: those whose networks can be run without PyTorch."""


@dataclass(frozen=True)
class RecordingKey:
    """By what a recording is found: what a request says beside its prompt and seed.

    Args:
        engine: By its name.
        decoder: By its name, as a `Request` has it.
        model: As it was named.
        steps: How many, if that was said.
        width: In pixels, if that was said.
        height: In pixels, if that was said.
    """

    engine: str
    decoder: str
    model: str
    steps: int | None = None
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class FileState:
    """By what a file is known not to have changed."""

    path: str
    num_bytes: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Look at a file; raises OSError where it is not there."""
        status = path.stat()
        return cls(str(path), status.st_size, status.st_mtime_ns)

    @property
    def is_current(self) -> bool:
        """Whether the file is as it was."""
        with suppress(OSError):
            return FileState.of(Path(self.path)) == self
        return False


@dataclass(frozen=True)
class GraphUse:
    """A compiled network and what is taken of its answer.

    Args:
        name: The fingerprint under which it is kept.
        settings: With which OpenVINO opens it.
        outputs: Places among the tensors of its answer.
    """

    name: str
    settings: dict[str, Any]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GraphUse:
        """Read it from JSON."""
        return cls(values["name"], values["settings"], tuple(values["outputs"]))


@dataclass(frozen=True)
class Steps:
    """The steps of a denoiser, which is called once for each.

    Args:
        inputs: What it is given, in order: "x", "time", "text", "pooled" and "sizes", or in the
            place of the time a "table" of two times (`diffusion.grid.time_table`).
        network_times: The numbers that it is fed for the times, 0 at the landing ...
        time_type: ... and how numpy calls their type.
        alphas: Signal at all times, the landing included.
        sigmas: Noise at all times, the landing included.
        prediction: What its output means: "eps", "x0", "v", or "next", the latents at the next
            time.
    """

    inputs: tuple[str, ...]
    network_times: tuple[float, ...]
    time_type: str
    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]
    prediction: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Steps:
        """Read them from JSON."""
        read = {name: tuple(each) for name, each in values.items() if isinstance(each, list)}
        return cls(**{**values, **read})


@dataclass(frozen=True)
class Recording:
    """All that a plain picture of one model, number of steps and size depends on but its prompt.

    Args:
        versions: Of the libraries that made the networks.
        files: Those of the model and its tokenizers.
        tokenizers: The folders of both.
        texts: The two text encoders: their embeddings, and of the second also the pooled one.
        denoiser: One step: what `Steps.prediction` says.
        steps: How there are made more of it.
        decoder: The pictures.
        is_large: Whether the denoiser is one whose weights should not be in memory beside others.
        sizes: SDXL's micro-conditioning, in pixels.
        latent_shape: Of one picture.
        latent_scale: What latents are divided by to be the autoencoder's own ...
        latent_mean: ... what is then added ...
        tiny_factor: ... by what that is multiplied for a tiny decoder, 1 for the autoencoder's ...
        tiny_divisor: ... and what it is divided by.
        contract: As JSON.
        settled: The fields of the request that were filled in.
        origin: As in `Result`.
        zeros_for_empty: As in `ModelTraits`.
    """

    versions: dict[str, str]
    files: tuple[FileState, ...]
    tokenizers: tuple[str, str]
    texts: tuple[GraphUse, GraphUse]
    denoiser: GraphUse
    steps: Steps
    decoder: GraphUse
    sizes: tuple[float, ...]
    latent_shape: tuple[int, ...]
    latent_scale: float
    latent_mean: float
    tiny_factor: float
    tiny_divisor: float
    contract: str
    settled: dict[str, Any]
    origin: tuple[str, ...]
    zeros_for_empty: bool
    is_large: bool

    @classmethod
    def from_json(cls, text: str | bytes) -> Recording:
        """Read what `to_json` wrote; ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        first_text, second_text = values["texts"]
        first_words, second_words = values["tokenizers"]
        read = {
            "files": tuple(FileState(**each) for each in values["files"]),
            "tokenizers": (first_words, second_words),
            "texts": (GraphUse.of(first_text), GraphUse.of(second_text)),
            "denoiser": GraphUse.of(values["denoiser"]),
            "steps": Steps.of(values["steps"]),
            "decoder": GraphUse.of(values["decoder"]),
            "sizes": tuple(values["sizes"]),
            "latent_shape": tuple(values["latent_shape"]),
            "origin": tuple(values["origin"]),
        }
        return cls(**{**values, **read})

    def to_json(self) -> str:
        """Write the recording as JSON."""
        return json.dumps(asdict(self), indent=2)

    @property
    def is_current(self) -> bool:
        """Whether model and libraries are as they were."""
        return self.versions == versions() and all(file.is_current for file in self.files)


class OpenRecording:
    """A recording whose networks are opened, a small denoiser and its decoder in a thread.

    That takes longer than all else of a drawing, and leaves the interpreter alone. Large networks
    are opened when it is their turn and then let go, so that they are not in memory together.

    Args:
        recording: Which networks they are.
    """

    def __init__(self, recording: Recording) -> None:
        from openvino import Core

        self.recording = recording
        self._core = Core()
        self._opening: dict[str, Future[tuple[OpenGraph | None, list[str]]]] = {}
        if not recording.is_large:
            pool = ThreadPoolExecutor(1)
            for use in (recording.denoiser, recording.decoder):
                self._opening[use.name] = pool.submit(self._open_elsewhere, use)
            pool.shutdown(wait=False)

    def text(self, place: int) -> OpenGraph | None:
        """Return the first or second text encoder; None where it is not there any more."""
        return self._open(self.recording.texts[place])

    def denoiser(self) -> OpenGraph | None:
        """Return the denoiser; None where it is not there any more."""
        return self._open(self.recording.denoiser)

    def decoder(self) -> OpenGraph | None:
        """Return the decoder; None where it is not there any more."""
        return self._open(self.recording.decoder)

    def _open(self, use: GraphUse) -> OpenGraph | None:
        """Return a network, waiting for it if it is being opened already."""
        opening = self._opening.pop(use.name, None)
        if opening is None:
            return self._open_here(use)
        network, notes = opening.result()
        for note in notes:
            say(note)
        return network

    def _open_here(self, use: GraphUse) -> OpenGraph | None:
        def load(blob: Blob) -> OpenGraph:
            from openvino import Tensor

            body = Tensor(blob.body, shared_memory=True)
            compiled = self._core.import_model(body, "CPU", use.settings)
            return OpenGraph(compiled, use.outputs, memory=(body, blob))

        return restored(
            use.name, load, what="a compiled network", errors=(KeyError, RuntimeError, ValueError)
        )

    def _open_elsewhere(self, use: GraphUse) -> tuple[OpenGraph | None, list[str]]:
        """Return a network, and what there is to say of it, which a thread has for itself."""
        return self._open_here(use), take_notes()


class OpenGraph:
    """A compiled network that was opened.

    Args:
        compiled: What OpenVINO made of it.
        outputs: Places of what is wanted among the tensors of its answer.
        memory: Where its weights lie, which must not go before it.
    """

    def __init__(self, compiled: Any, outputs: Sequence[int], memory: object) -> None:
        self._request = compiled.create_infer_request()
        self._outputs = outputs
        self._memory = memory

    def __call__(self, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """Return what is wanted of the answer."""
        for place, array in enumerate(arrays):
            self._request.get_input_tensor(place).data[:] = array
        self._request.infer()
        return [self._request.get_output_tensor(place).data.copy() for place in self._outputs]


def open_recording(key: RecordingKey) -> OpenRecording | None:
    """Begin to open the networks of a key; None where nothing current is recorded for it."""
    if key.engine not in ENGINES or find_spec("openvino") is None:
        return None
    recording = read_recording(key)
    return None if recording is None else OpenRecording(recording)


def read_recording(key: RecordingKey) -> Recording | None:
    """Return the recording of a key; None where there is none, or one that has grown old."""
    try:
        recording = Recording.from_json(recording_path(key).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is written anew by the drawing that follows
    return recording if recording.is_current else None


def write_recording(key: RecordingKey, recording: Recording) -> bool:
    """Keep a recording under its key; returns whether it was kept."""
    try:
        with write_atomically(recording_path(key)) as file:
            file.write(recording.to_json().encode())
    except (OSError, WriteError):
        return False
    return True


def recording_path(key: RecordingKey) -> Path:
    """Return where the recording of a key lies.

    A name of a model that means a folder here means another one elsewhere.
    """
    here = Path(key.model)
    facts = {
        "twostep": __version__,
        "engine": key.engine,
        "decoder": key.decoder,
        "model": key.model,
        "folder": str(here.resolve()) if here.exists() else None,
        "steps": key.steps,
        "size": [key.width, key.height],
        "threads": [os.environ.get("OMP_NUM_THREADS"), num_cores()],
    }
    return cache_folder() / "recordings" / f"{fingerprint(facts)}.json"


def versions() -> dict[str, str]:
    """Return the versions of what makes networks, without loading any of it."""
    found = {}
    for name in ("openvino", "torch"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
