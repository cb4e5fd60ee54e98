"""Models to the hub: which files would go there, and sending them."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from twostep.formats.header import read_header
from twostep.formats.locate import ModelError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BESIDE = (".md", ".png", ".json", ".api.json")
"""What `twostep export` writes beside a file: card, picture, and workflows."""


def files_to_push(path: Path, repo: str) -> dict[str, Path]:
    """Return what would be sent of an exported model, by the names that it would have on the hub.

    Arguments:
        path: an exported folder, or an exported file with what lies beside it.
        repo: the repository, as owner/name.

    Raises ModelError for a wrong name, pickles, damaged files, or a model without card or weights.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is no name on the hub ({error}). Give owner/name.") from error
    files = _files_in(path) if path.is_dir() else _files_beside(path)
    for file in files.values():
        if file.suffix in _PICKLES:
            raise ModelError(
                f"{file} is a pickle, which nobody should have to load. Delete it, or convert it."
            )
        if file.suffix == ".safetensors":
            read_header(file)  # says what is wrong with a file that is damaged
    if "README.md" not in files or not any(name.endswith(".safetensors") for name in files):
        raise ModelError(f"{path} has no card or no weights. Push what `twostep export` wrote.")
    return files


def _files_in(folder: Path) -> dict[str, Path]:
    """Return all files of a folder but the hidden ones, by their paths in it."""
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if file.is_file() and not is_hidden:
            files[str(name)] = file
    return files


def _files_beside(path: Path) -> dict[str, Path]:
    """Return a file and what lies beside it; the card becomes the repository's README."""
    files = {}
    for suffix in _BESIDE:
        file = path.with_suffix(suffix)
        if file.is_file():
            files["README.md" if suffix == ".md" else file.name] = file
    return files | {path.name: path}


def push(path: Path, repo: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Send a model to the hub in one commit.

    Arguments:
        path: what `twostep export` wrote.
        repo: the repository, as owner/name; it is made if it does not exist.
        private: whether a new repository is for its owner alone.
        api: the connection; by default with the login of `hf auth login`.

    Returns the address of the commit. Raises ModelError if the hub refuses.
    """
    hub = api or HfApi()
    files = files_to_push(path, repo)
    added = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        commit = hub.create_commit(repo, added, commit_message=f"Add {path.name}")
    except Exception as error:  # what a connection raises changes with the hub's library
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{repo} could not be written ({reason}). Check login and connection: hf auth login."
        ) from error
    return str(commit.commit_url)
