"""Verbs on files: export, inspect, convert, adopt, verify, extract, push."""

import json
from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A model or a LoRA: a built-in name, a folder, a file, a hub id "
            "(owner/repo or owner/repo/file)."
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(help="diffusers, comfyui, unet, lora-kohya, lora-peft or lora-animatediff."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The folder for diffusers, else the .safetensors to write."
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="Of a run's folder: its snapshot at that iteration, 1000 or STAGE:1000."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Picks the student of a model that has several.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA to merge in, file or file:weight; or several.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="LoRAs that do not say it: a model with the same layers.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="For the card: what it draws.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="For the card: figures, a JSON object or a list.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card: the hub's name of a licence.")
    ] = None,
) -> None:
    """Write a model as others load it, with its contract, a card, and for ComfyUI workflows.

    Of a run's snapshot (--at), all the usual forms are written if none is named.
    """
    from twostep.export.card import Card
    from twostep.export.writing import export as write

    card = Card(picture, evaluation, license)
    loras = tuple(lora or ())
    if at is not None:
        from twostep.distill.snapshots import export_snapshot

        if steps is not None:
            raise typer.BadParameter("--at names one student; leave --steps out.")
        for path in export_snapshot(
            Path(model), at, to=to, out=out, base=base, loras=loras, card=card
        ):
            typer.echo(path)
        return
    if to is None or out is None:
        raise typer.BadParameter("give --to and --out; only --at can do without them.")
    typer.echo(write(model, to, out, steps=steps, base=base, loras=loras, card=card))


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            help="Any .safetensors, or the name of a built-in or official one, or on the hub "
            "owner/repo or owner/repo/file."
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a file is, how it is to be sampled, and who can load it; its weights are not
    read.
    """
    from twostep.formats import ModelError, resolve
    from twostep.formats.identify import summary

    checkpoint = resolve(file)
    path = checkpoint.path
    if checkpoint.is_folder:
        raise ModelError(
            f"{path} is a model folder: `twostep info {path}` says what is in it. Give one file."
        )
    properties = summary(checkpoint.file)
    contract = checkpoint.carried
    if as_json:
        as_object = json.loads(contract.to_json()) if contract else None
        typer.echo(json.dumps({**properties, "contract": as_object}, indent=2))
        return
    from rich.console import Console

    from twostep.cli.draw import contract_table

    for name, value in {"file": str(path), **properties}.items():
        typer.echo(f"{name:>10}  {value}")
    Console().print(contract_table([contract]) if contract else "It carries no contract.")


def convert(
    model: Annotated[
        str,
        typer.Argument(
            help="A LoRA (a file, a folder with one, owner/repo, owner/repo/file), a whole "
            "checkpoint in one file, or a diffusers folder."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="LoRA: kohya, kohya-diffusers, peft, early; else diffusers or single-file."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The .safetensors, or the folder, to write.")
    ],
    base: Annotated[
        str | None, typer.Option(help="LoRAs that do not say it: a model with the same layers.")
    ] = None,
) -> None:
    """Write a file in another form, bit for bit: every key is accounted for, nothing is left
    out.
    """
    from twostep.export.conversion import convert as write

    typer.echo(write(model, to, out, base=base))


def adopt(
    file: Annotated[
        Path,
        typer.Argument(
            help="An AnimateDiff motion module by its own names or diffusers', as .safetensors."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model folder to write.")],
    base: Annotated[
        list[str],
        typer.Option(
            help="The picture model that draws; more of the same shape to distil students on."
        ),
    ],
    frames: Annotated[int, typer.Option(min=2, help="Of a clip that says no other length.")] = 16,
) -> None:
    """Make a model of clips of somebody's motion module, to draw with and to distil.

    Its noise is AnimateDiff's for Stable Diffusion 1.5 and SDXL, and else the picture model's.
    """
    from twostep.models.motion import adopt_motion_module

    typer.echo(adopt_motion_module(file, base, out, frames=frames))


def verify(
    model: Annotated[
        str, typer.Argument(help="A built-in name, a folder, a file or a hub id.")
    ] = "nano",
    steps: Annotated[
        int | None, typer.Option(help="Picks the student of a model that has several.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="diffusers, or comfyui where --comfyui-path is.")
    ] = "diffusers",
    comfyui_path: Annotated[Path | None, typer.Option(help="The folder of a ComfyUI.")] = None,
    prompt: Annotated[str, typer.Option(help="What both draw.")] = "a red apple",
    seed: Annotated[int, typer.Option(help="Of the noise that both start from.")] = 0,
    bound: Annotated[
        float, typer.Option(help="The relative difference over which it fails.")
    ] = 1e-4,
) -> None:
    """Draw with another program too, from the same noise, and print the differences of x0 at each
    step.
    """
    from twostep.export.verification import verify as compare
    from twostep.formats.locate import ModelError

    is_known = against in ("diffusers", "comfyui")
    needs_path = against == "comfyui"
    if not is_known or needs_path != (comfyui_path is not None):
        raise ModelError(
            f"--against is {against!r}; "
            "expected diffusers, or comfyui together with --comfyui-path."
        )
    differences = compare(model, prompt=prompt, seed=seed, steps=steps, comfyui=comfyui_path)
    for step, (largest, relative) in enumerate(differences, 1):
        typer.echo(f"step {step}: largest {largest:.2e}, relative {relative:.2e}")
    # Written so that NaN fails as well.
    if not all(relative <= bound for _, relative in differences):
        raise ModelError(f"{model} differs from {against} by more than {bound:g}.")


def extract(
    base: Annotated[str, typer.Argument(help="The model that the LoRA will go on.")],
    tuned: Annotated[str, typer.Argument(help="What it shall become with the LoRA.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The .safetensors to write, with card and workflows."),
    ],
    rank: Annotated[int, typer.Option(min=1, help="The higher, the nearer and the larger.")] = 64,
    steps: Annotated[int | None, typer.Option(help="Picks the student of the tuned model.")] = None,
) -> None:
    """Write the difference of two models as a LoRA."""
    from twostep.export.extraction import extract as write

    missing_share, left_out = write(base, tuned, out, rank=rank, steps=steps)
    typer.echo(out)
    typer.echo(f"of the layers' change it lacks {missing_share:.2%}", err=True)
    if left_out:
        typer.echo(
            f"{len(left_out)} other weights changed, for which a LoRA has no place, "
            f"as {left_out[0]}",
            err=True,
        )


def push(
    path: Annotated[Path, typer.Argument(help="What `twostep export` wrote.", exists=True)],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="For you alone, where the repository is new.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Send an exported model to the hub, with its card; the login is that of `hf auth login`."""
    from twostep.export.hub import files_to_push
    from twostep.export.hub import push as send

    if not dry_run:
        typer.echo(f"sent: {send(path, repo, private=private)}")
        return
    files = files_to_push(path, repo)
    for name, file in files.items():
        typer.echo(f"{file.stat().st_size:>15,}  {repo}/{name}")
    card = files["README.md"].read_text(encoding="utf-8")
    # The hub reads the metadata of a card, which stand between its first two rules.
    typer.echo(card.split("---")[1].strip())
