"""Models to the hub: what would go there, and going there."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from twostep.formats.identify import read_header
from twostep.formats.locate import ModelError


def files_to_push(path: Path, repo: str) -> dict[str, Path]:
    """Return an exported folder's files, or a file with what lies beside it, by their names there;
    ModelError.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is no name on the hub ({error}). Give owner/name.") from error
    if path.is_dir():
        found = {
            str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()
        }
        found = {
            name: file
            for name, file in found.items()
            if not any(part[0] == "." for part in Path(name).parts)
        }
    else:
        beside = {end: path.with_suffix(end) for end in (".md", ".png", ".json", ".api.json")}
        found = {
            "README.md" if end == ".md" else file.name: file
            for end, file in beside.items()
            if file.is_file()
        }
        found[path.name] = path
    for file in found.values():
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise ModelError(
                f"{file} is a pickle, which nobody should have to load. Delete it, or convert it."
            )
        if file.suffix == ".safetensors":
            read_header(file)
    if "README.md" not in found or not any(name.endswith(".safetensors") for name in found):
        raise ModelError(f"{path} has no card or no weights. Push what `twostep export` wrote.")
    return found


def push(path: Path, repo: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Send a model to the hub in one commit, to a repository that is made where it is missing;
    returns its address.
    """
    hub, found = api or HfApi(), files_to_push(path, repo)
    added = [CommitOperationAdd(name, str(file)) for name, file in found.items()]
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        return str(hub.create_commit(repo, added, commit_message=f"Add {path.name}").commit_url)
    except Exception as error:  # what a connection raises changes with the hub's library
        reason = str(error).splitlines()[0]
        advice = "Check login and connection: hf auth login"
        raise ModelError(f"{repo} could not be written ({reason}). {advice}.") from error
