"""The verbs that make a cache to train from and students, and say what it takes and how it went."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from twostep.distill import DistillRecipe
    from twostep.distill.trainer import Source
    from twostep.models.bundle import Bundle

Recipe = Annotated[str, typer.Argument(help="Name of a built-in recipe, or path of a TOML file.")]
Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="key.path=value, as often as needed.")
]
Out = Annotated[Path, typer.Option(help="The run's folder; the same command again resumes there.")]

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


def spoken(figures: dict[str, float]) -> str:
    """Return the figures of one iteration in a few words."""
    return " ".join(f"{key} {value:.3f}" for key, value in figures.items())


def recipes() -> None:
    """List the recipes that come with the package."""
    from twostep.training.recipe import find_recipe, recipe_names

    table = Table(box=None, pad_edge=False, show_header=False)
    for name in recipe_names():
        first_line = find_recipe(name).read_text(encoding="utf-8").split("\n", 1)[0]
        table.add_row(Text(name, style="bold"), Text(first_line.lstrip("# ")))
    Console().print(table)


def recipe(
    name: Annotated[str, typer.Argument(help="A name that `twostep recipes` lists.")],
) -> None:
    """Print a recipe: twostep recipe NAME > mine.toml copies it out."""
    from twostep.training.recipe import find_recipe

    typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


def cache(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of pictures with .txt captions, .jsonl, .tar shards (a pattern), hf:dataset; "
            "or a .txt file of prompts, one a line, whose pictures the teacher makes."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the cache; the same command again goes on there.")
    ],
    model: Annotated[
        str, typer.Option(help="The teacher: its autoencoder and text encoders are used.")
    ] = "nano",
    lora: Annotated[
        list[str] | None, typer.Option(help="Prompts alone: LoRAs for the teacher, file:weight.")
    ] = None,
    square: Annotated[
        bool, typer.Option(help="Cut everything square, as the paper did; else to the nearest.")
    ] = False,
    min_side: Annotated[
        int, typer.Option(min=0, help="Skip pictures with a side of fewer pixels.")
    ] = 0,
    min_sharpness: Annotated[
        float, typer.Option(min=0, help="Skip blurred ones: deviation of the Laplacian.")
    ] = 0.0,
    per_prompt: Annotated[int, typer.Option(min=1, help="Prompts alone: pictures of each.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Prompts alone: the teacher's steps.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=1, help="Prompts alone: the teacher's guidance.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Pictures that are worked on at once.")
    ] = 8,
) -> None:
    """Encode pictures and captions, or let the teacher draw prompts, into shards to train from."""
    from twostep.data.encoding import cache_pictures, cache_prompts
    from twostep.data.sources import Demands, find_entries
    from twostep.models.loading import load_with_loras

    path, prompts = Path(source), None
    if path.suffix == ".txt" and path.is_file():
        prompts = [
            line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
    entries = find_entries(source) if prompts is None else iter(())
    first = list(islice(entries, 1))  # so an empty or missing source is told before a model loads
    bundle = load_with_loras(model, lora or []).as_teacher()
    with progress_bar("cache") as advance:

        def show(done: int, skipped: int) -> None:
            advance(
                done, None if prompts is None else len(prompts) * per_prompt, f"{skipped} skipped"
            )

        if prompts is None:
            sizes, demands = bundle.contract.sizes, Demands(min_side, min_sharpness)
            pictures = partial(
                cache_pictures,
                chain(first, entries),
                sizes=sizes[: 1 if square else None],
                demands=demands,
            )
        else:
            pictures = partial(
                cache_prompts, prompts, per_prompt=per_prompt, steps=steps, guidance=guidance
            )
        written = pictures(bundle, out, batch_size=batch_size, on_item=show)
    typer.echo(
        f"{out}: {written.num_cached} items in {written.num_shards} shards, {len(written.skipped)} skipped"
    )
    for name, reason in list(written.skipped.items())[:5]:
        typer.echo(f"skipped {name}: {reason}")
    if len(written.skipped) > 5:
        typer.echo(f"and {len(written.skipped) - 5} more, all in {out / 'skipped.jsonl'}")


def _size(text: str) -> float:
    found = re.fullmatch(r"([\d.]+)G(i?)B", text)
    if found is None:
        raise typer.BadParameter(f"{text} is no size; write 24GB, or 22.5GiB.")
    return float(found[1]) * (2**30 if found[2] else 1e9)


def plan(
    recipe: Recipe,
    override: Override = None,
    memory: Annotated[
        float | None, typer.Option(parser=_size, help="What there is, as 24GB; less fails.")
    ] = None,
) -> None:
    """Say what a recipe takes before it runs: evaluations, parameters, memory, disk; no weights are
    loaded.
    """
    from twostep.distill import DistillRecipe
    from twostep.distill.plan import advise
    from twostep.distill.plan import plan as make_plan
    from twostep.training.recipe import load_recipe

    settings, limit = load_recipe(recipe, DistillRecipe, override or []), memory or math.inf
    phases, item_bytes, num_items = make_plan(settings)
    for planned in phases:
        phase = planned.phase
        trained = ", ".join(f"{role} {count:,}" for role, count in planned.trained.items())
        parts = ", ".join(
            f"{part} {size / 2**30:.2f}" for part, size in planned.memory.items() if size
        )
        typer.echo(
            f"{phase.name}: {phase.iterations} iterations of {phase.batch_size}; trained: {trained}"
        )
        typer.echo(f"  teacher: {planned.evaluations:g} evaluations per example and iteration")
        typer.echo(f"  {planned.peak / 2**30:.2f} GiB: {parts}")
        typer.echo(f"  {planned.pictures / 2**30:.2f} GiB while a checkpoint's pictures are drawn")
    count = (
        f" x {num_items:,} = {item_bytes * num_items / 2**30:.2f} GiB" if num_items else " an item"
    )
    typer.echo(f"data: {item_bytes:,} bytes{count}")
    worst = max(range(len(phases)), key=lambda i: phases[i].highest)
    if phases[worst].highest <= limit:
        return
    large = ", ".join(planned.phase.name for planned in phases if planned.highest > limit)
    typer.echo(
        f"{limit / 2**30:.2f} GiB are too little for {large}. {phases[worst].phase.name} would take:"
    )
    for change, peak in advise(settings, worst):
        told = ", ".join(f"{key} = {value}" for key, value in change.items())
        typer.echo(f"  {peak / 2**30:.2f} GiB with {told}{' (fits)' if peak <= limit else ''}")
    raise typer.Exit(1)


def distill(recipe: Recipe, out: Out, override: Override = None) -> None:
    """Distil a teacher into students of few steps, by the phases of the recipe."""
    from twostep import __version__
    from twostep.distill import DistillRecipe, distil
    from twostep.models.loading import load_bundle, load_with_loras
    from twostep.training.device import find_device
    from twostep.training.processes import joined
    from twostep.training.recipe import load_recipe
    from twostep.training.run_folder import RunFolder

    settings = load_recipe(recipe, DistillRecipe, override or [])
    with (
        joined(find_device(settings.device)) as world,
        progress_bar("distil", shown=world.is_first) as advance,
    ):
        style, folder = settings.style_lora, RunFolder(out, settings)
        teacher = load_with_loras(
            settings.model, [str(style)] if style else [], steps=settings.model_steps
        )
        start = (
            load_bundle(settings.model, steps=settings.start_steps)
            if settings.starts_apart
            else None
        )
        written = distil(
            settings,
            teacher,
            _source(settings, teacher, out, advance),
            folder,
            version=__version__,
            recipe_name=Path(recipe).stem,
            start=None if start is None else start.denoiser,
            on_iteration=lambda phase, done, figures: advance(
                done, phase.iterations, f"{phase.name} {spoken(figures)}"
            ),
        )
    for path in written.values() if world.is_first else ():
        typer.echo(f"written: {path}")


def report(
    run: Annotated[Path | None, typer.Argument(help="The folder of a `twostep distill`.")] = None,
    lora: Annotated[
        str | None, typer.Option(help="Instead of a run: a LoRA that makes few-step students.")
    ] = None,
    bases: Annotated[
        str, typer.Option(help="The models to try it on, with commas between.")
    ] = "nano",
    prompts: Annotated[
        Path | None, typer.Option(exists=True, help="A file of what to draw, one a line.")
    ] = None,
) -> None:
    """Make one HTML page of a run, also of one that goes on; or find how strong a LoRA is best on
    other bases.
    """
    if lora is not None and run is None:
        from twostep.reports.portability import PROMPTS, print_scales

        asked = (
            [line for line in prompts.read_text("utf-8").splitlines() if line.strip()]
            if prompts
            else PROMPTS
        )
        if not asked:
            raise typer.BadParameter(f"{prompts} is empty; give a prompt on every line.")
        print_scales(lora, bases.split(","), tuple(asked))
    elif run is not None and lora is None:
        from twostep.reports.run_page import write_report

        typer.echo(f"written: {write_report(run)}")
    else:
        raise typer.BadParameter("give the folder of a run, or --lora and --bases.")


def _source(settings: DistillRecipe, teacher: Bundle, out: Path, advance: OnProgress) -> Source:
    """Return what the recipe learns from: a cache, or what a function makes of the teacher, which
    may be here alone.
    """
    from twostep.data.cache import load_cache
    from twostep.training.recipe import RecipeError

    if settings.data is None:
        raise RecipeError(
            "this recipe has no data: make some with `twostep cache`, and say -o data=FOLDER."
        )
    if settings.cache is not None:
        return load_cache(settings.cache, teacher)
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = resolve_name(settings.data)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RecipeError(
            f'data = "{settings.data}" is not to be found from {Path.cwd()} ({error}).'
        ) from error
    source: Source = make(teacher, out, advance, **settings.data_options)
    return source


@contextmanager
def progress_bar(title: str, shown: bool = True) -> Iterator[OnProgress]:
    """Show a bar with counts and the time that remains; yields what moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    clocks = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *clocks, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=f"{title} {text}".strip()
        )
