"""Where one file lies, most often a LoRA: a file, a folder, a built-in name, or the hub."""

import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

from twostep.formats.locate import CONTRACT_FILE, INDEX_FILE, ModelError, find_model
from twostep.formats.peft_config import CONFIG_FILE

SUFFIX = ".safetensors"

_HUB = re.compile(
    r"(?P<marked>hf:)?(?P<repository>(?P<owner>(?!\.)[\w.-]+)/(?!\.)[\w.-]+(?<!\.safetensors))"
    r"(/(?P<file>.+\.safetensors))?"
)
"""A repository, or a file in one. `hf:` says that it is no path, even if there is such a folder."""

_SECONDS = 10.0
"""How long the hub may take to answer."""

_USUAL_NAMES = (f"pytorch_lora_weights{SUFFIX}", f"adapter_model{SUFFIX}")
"""What diffusers and PEFT call the file, in this order."""


def find_lora_file(name: str) -> Path:
    """Return the .safetensors of a LoRA.

    Arguments:
        name: a file (its ending may be left out), a folder with one LoRA, a built-in or official
            name, `owner/repo` on the hub with one LoRA, or `owner/repo/file.safetensors`; `hf:`
            before it if there is a folder of the owner's name here.

    Raises ModelError if there is none, or several, with what there is.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(name, path)
    with_suffix = path.with_name(f"{path.name}{SUFFIX}") if path.name else path
    if with_suffix.is_file():
        return with_suffix
    on_hub = _HUB.fullmatch(name)
    if on_hub and (on_hub["marked"] or not Path(on_hub["owner"]).exists()):
        found = _on_hub(on_hub["repository"], on_hub["file"])
        if not found.is_file():
            # It has been removed from the hub's cache since it was found there.
            _on_hub.cache_clear()
            found = _on_hub(on_hub["repository"], on_hub["file"])
        return found
    if "/" in name or "\\" in name:
        # A path that is missing is never asked of the hub.
        raise ModelError(
            f"{name} does not exist. Give a LoRA's {SUFFIX}, a folder with one, a built-in name, "
            "or a hub id (owner/name, hf:owner/name)."
        )
    found = find_model(name)
    return _in_folder(name, found) if found.is_dir() else found


def may_be_one_file(name: str | Path) -> bool:
    """Tell whether what is no model folder may be found by `find_lora_file`.

    That is a path without its ending, a folder with weights in it, and what the hub is asked for.
    """
    path = Path(name)
    if not str(name).strip():
        return False
    if path.is_dir():
        return any(path.rglob(f"*{SUFFIX}"))
    if path.name and path.with_name(f"{path.name}{SUFFIX}").is_file():
        return True
    on_hub = None if isinstance(name, Path) else _HUB.fullmatch(name)
    return on_hub is not None and bool(on_hub["marked"] or not Path(on_hub["owner"]).exists())


def _in_folder(name: str, folder: Path) -> Path:
    """Return the one LoRA in a folder; raises ModelError for the folder of a model."""
    if any((folder / file).is_file() for file in (CONTRACT_FILE, INDEX_FILE)):
        raise ModelError(
            f"{name} is a model folder; give a LoRA's {SUFFIX}, a folder with one, or a name."
        )
    return folder / _only(name, [each.relative_to(folder).as_posix() for each in folder.rglob("*")])


def _only(place: str, names: list[str]) -> str:
    """Return the one LoRA among the files of a folder or repository."""
    candidates = sorted(name for name in names if name.endswith(SUFFIX))
    at_top = [name for name in candidates if "/" not in name]
    for usual in _USUAL_NAMES:
        if usual in at_top:
            return usual
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise ModelError(
            f"{place} has no {SUFFIX} in it, so it is no LoRA. Pickles are not read: they can run "
            "code."
        )
    listed = ", ".join(candidates[:5]) + (" ..." if len(candidates) > 5 else "")
    raise ModelError(f"{place} has several files: {listed}. Name one, as {place}/{candidates[0]}.")


@lru_cache(maxsize=64)
def _on_hub(repository: str, file: str | None) -> Path:
    """Return a LoRA of a hub repository, fetched with its config if it is not in the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        chosen = file or _only(repository, _listed(repository))
        path = Path(hf_hub_download(repository, chosen))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{repository}{f'/{file}' if file else ''} is neither here nor to be had from the hub "
            f"({reason}). Check the name and the connection, or give the path of a file."
        ) from error
    # Most have no config, and with a file from the cache it is there too if there is one.
    with suppress(EntryNotFoundError):
        hf_hub_download(repository, PurePosixPath(chosen).with_name(CONFIG_FILE).as_posix())
    return path


def _listed(repository: str) -> list[str]:
    """List the files of a hub repository; without a connection, those in the cache."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
        names = [each.relative_to(folder).as_posix() for each in folder.rglob("*.*")]
        if any(name.endswith(SUFFIX) for name in names):
            return names
    except (LocalEntryNotFoundError, RepositoryNotFoundError):
        names = []
    try:
        info = HfApi().model_info(repository, timeout=_SECONDS)
    except Exception as error:  # the client lets errors of several libraries through
        raise ModelError(
            f"{repository} is neither here nor to be had from the hub "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Check the "
            "name and the connection, or give the path of a file."
        ) from error
    return [sibling.rfilename for sibling in info.siblings or ()]
