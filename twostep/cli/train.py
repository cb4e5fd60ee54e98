"""The verbs of training: recipes, recipe, plan, distill, report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from twostep.cli.units import duration_in_seconds, size_in_bytes

if TYPE_CHECKING:
    from twostep.distill import DistillRecipe
    from twostep.distill.decoder import DecoderRecipe
    from twostep.distill.pairs import Source
    from twostep.distill.plan import Advice, Plan, StagePlan
    from twostep.distill.recipe import RunRecipe, TrainedStage
    from twostep.models.bundle import Bundle
    from twostep.training.run_folder import RunFolder

Recipe = Annotated[str, typer.Argument(help="Name of a built-in recipe, or path of a TOML file.")]
Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="key.path=value, as often as needed.")
]
Out = Annotated[Path, typer.Option(help="The run's folder; the same command again resumes there.")]

OnProgress = Callable[[int, int | None, str], None]
"""Called with what is done, of how many, and a word on it."""


_SECONDS_BETWEEN_LINES = 30.0
"""How often a progress without a terminal is told."""


def _figures_text(figures: dict[str, float]) -> str:
    """Return the figures of one iteration in one line."""
    return " ".join(f"{key} {value:.3g}" for key, value in figures.items())


def recipes() -> None:
    """List the recipes that come with the package."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from twostep.training.recipe import find_recipe, recipe_names

    table = Table(box=None, pad_edge=False, show_header=False)
    for name in recipe_names():
        first_line = find_recipe(name).read_text(encoding="utf-8").split("\n", 1)[0]
        table.add_row(Text(name, style="bold"), Text(first_line.lstrip("# ")))
    Console().print(table)


def recipe(
    name: Annotated[str | None, typer.Argument(help="A name that `twostep recipes` lists.")] = None,
    migrate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Instead: print this old recipe rewritten."),
    ] = None,
) -> None:
    """Print a recipe: twostep recipe NAME > mine.toml copies it out."""
    from twostep.training.recipe import find_recipe, recipe_text

    if migrate is not None and name is None:
        from twostep.distill.migration import migrate as rewritten

        text = rewritten(recipe_text(migrate))
    elif name is not None and migrate is None:
        text = recipe_text(find_recipe(name))
    else:
        raise typer.BadParameter("give the name of a recipe, or --migrate OLD.toml.")
    typer.echo(text, nl=False)


def _device_type(text: str) -> str:
    """Return the name of a type of device if torch knows it, here or elsewhere."""
    import torch

    try:
        return torch.device(text).type
    except RuntimeError as error:
        raise typer.BadParameter(f"{text} is no device; write cuda, mps or cpu.") from error


def plan(
    recipe: Recipe,
    override: Override = None,
    memory: Annotated[
        float | None, typer.Option(parser=size_in_bytes, help="What there is, as 24GB; less fails.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            parser=_device_type,
            help="Plan for this type of device, as cuda; this machine need not have it.",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(min=1, help="Plan for one of so many, as torchrun starts them."),
    ] = 1,
) -> None:
    """Say what a recipe takes before it runs: evaluations, parameters, memory, disk.

    No weights are loaded.
    """
    settings = _load_recipe(recipe, override)
    if device is not None:
        settings = settings.model_copy(update={"device": device})
    with progress_bar("plan") as advance:
        planned = _kind_of(settings).plan(settings, processes=processes, advance=advance)
    other = "" if device or planned.device != "cpu" else "; for a GPU: --device cuda"
    many = f", one of {processes} processes" if processes > 1 else ""
    typer.echo(f"planned for: {planned.device}{many}{other}")
    for stage in planned.stages:
        _print_stage(stage)
    whole = f" x {planned.num_items:,} = {_gib(planned.item_bytes * planned.num_items)}"
    typer.echo(f"data: {planned.item_bytes:,} bytes{whole if planned.num_items else ' an item'}")
    stay = sum(stage.finished for stage in planned.stages)
    typer.echo(f"disk: checkpoints take {_gib(planned.disk)} at most, and {_gib(stay)} stay")
    if snapshots := sum(stage.snapshots for stage in planned.stages):
        typer.echo(f"disk: snapshots take {_gib(snapshots)}")
    if memory is not None and max(stage.highest for stage in planned.stages) > memory:
        _print_advice(settings, planned.stages, memory, processes)
        raise typer.Exit(1)


def _gib(num_bytes: int | float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _print_stage(planned: StagePlan) -> None:
    """Print the plan of one stage in five lines."""
    stage = planned.stage
    trained = ", ".join(f"{role} {count:,}" for role, count in planned.trained.items())
    parts = [f"{part} {size / 2**30:.2f}" for part, size in planned.memory.items() if size]
    typer.echo(
        f"{stage.name}: {stage.iterations} iterations of {stage.batch_size}; trained: {trained}"
    )
    typer.echo(f"  teacher: {planned.evaluations:g} evaluations per example and iteration")
    typer.echo(f"  {_gib(planned.peak)}: {', '.join(parts)}")
    typer.echo(f"  {_gib(planned.pictures)} while a checkpoint's pictures are drawn")
    typer.echo(f"  {_gib(planned.checkpoint)} a checkpoint")


def _print_advice(
    settings: DistillRecipe | DecoderRecipe,
    planned: Sequence[StagePlan],
    memory: float,
    processes: int,
) -> None:
    """Print which stages are too large, and what would make the largest one smaller."""
    worst = max(range(len(planned)), key=lambda i: planned[i].highest)
    large = ", ".join(entry.stage.name for entry in planned if entry.highest > memory)
    name = planned[worst].stage.name
    typer.echo(f"{_gib(memory)} are too little for {large}. {name} would take:")
    with progress_bar("try") as advance:
        advice = _kind_of(settings).advise(settings, worst, processes, advance)
    for change, peak in advice:
        changes = ", ".join(f"{key} = {value}" for key, value in change.items())
        fits = " (fits)" if peak <= memory else ""
        typer.echo(f"  {_gib(peak)} with {changes}{fits}")


def distill(
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name of a built-in recipe, or path of a TOML file; --decoder needs none."
        ),
    ] = None,
    override: Override = None,
    until: Annotated[
        float | None,
        typer.Option(
            parser=duration_in_seconds, help="Write a checkpoint and stop within 3h, 90m, 1h30m."
        ),
    ] = None,
    accept_replaced: Annotated[
        bool,
        typer.Option(help="Go on though teacher or data were replaced since the run began."),
    ] = False,
    decoder: Annotated[
        str | None,
        typer.Option(help="Distil a tiny decoder for this model's autoencoder instead."),
    ] = None,
) -> None:
    """Distil a teacher into students of few steps, by the stages of the recipe.

    Or an autoencoder into a tiny decoder, by a recipe of one or with --decoder MODEL. Ctrl-C and
    SIGTERM stop it after the iteration that it is at, whose checkpoint is written.
    """
    started_at = time.monotonic()
    from twostep.distill.clock import ChainClock, duration, progress_line
    from twostep.training.device import find_device
    from twostep.training.processes import joined
    from twostep.training.run_folder import RunFolder

    recipe_name, settings = _recipe_of(recipe, decoder, override)
    with (
        joined(find_device(settings.device)) as world,
        progress_bar("distil", shown=world.is_first, lines=False) as advance,
    ):
        folder = RunFolder(out, settings)
        folder.deadline = None if until is None else started_at + until
        settings = folder.settled(settings)
        for change in folder.changes:
            typer.echo(f"changed since the last call: {change}", err=True)
        clock = ChainClock(settings.trained_stages)
        if world.is_first and not _has_terminal():
            folder.listeners.append(lambda logged: _print_line(progress_line(clock, logged)))

        def on_iteration(stage: TrainedStage, num_done: int, figures: dict[str, float]) -> None:
            clock.tick(stage, num_done)
            left = clock.seconds_left(stage, num_done)
            chain = "" if left is None else f" (chain {duration(left)})"
            advance(num_done, stage.iterations, f"{stage.name}{chain} {_figures_text(figures)}")

        written = _kind_of(settings).distil(
            settings,
            folder,
            recipe_name,
            advance,
            accept_replaced=accept_replaced,
            on_iteration=on_iteration,
        )
    if world.is_first:
        for path in written:
            typer.echo(f"written: {path}")


class _Kind(NamedTuple):
    """What is done with the recipes of one kind.

    Attributes:
        plan: says what a recipe takes, in one of so many processes, and how far it has come.
        advise: returns what would make the stage of a place smaller in one of so many processes,
            and its highest memory then; says likewise how far it has come.
        distil: trains, and returns the files that it wrote.
    """

    plan: Callable[..., Plan]
    advise: Callable[[Any, int, int, OnProgress], Sequence[Advice]]
    distil: Callable[..., list[Path]]


def _kind_of(settings: DistillRecipe | DecoderRecipe) -> _Kind:
    from twostep.distill.decoder import DecoderRecipe
    from twostep.distill.decoder.plan import advise_decoder, plan_decoder
    from twostep.distill.plan import advise, plan

    if isinstance(settings, DecoderRecipe):
        return _Kind(
            plan_decoder,
            lambda recipe, _, processes, advance: advise_decoder(recipe, processes, advance),
            _distil_decoder,
        )
    return _Kind(plan, advise, _distil_chain)


def _distil_chain(
    settings: DistillRecipe, folder: RunFolder, recipe_name: str, advance: OnProgress, **more: Any
) -> list[Path]:
    """Run the stages of a recipe; `more` goes to `distil`. Returns the files of the students."""
    from twostep import __version__
    from twostep.distill import distil
    from twostep.models.loading import load_bundle, load_with_loras

    styles = [] if settings.style_lora is None else [str(settings.style_lora)]
    teacher = load_with_loras(settings.model, styles, steps=settings.model_steps)
    start = None
    if settings.starts_apart:
        start = load_bundle(settings.model, steps=settings.start_steps).denoiser
    source = _source(settings, teacher, folder.path, advance)
    written = distil(
        settings,
        teacher,
        source,
        folder,
        version=__version__,
        recipe_name=recipe_name,
        start=start,
        **more,
    )
    return list(written.values())


def _distil_decoder(
    settings: DecoderRecipe, folder: RunFolder, recipe_name: str, advance: OnProgress, **more: Any
) -> list[Path]:
    """Train a tiny decoder; `more` goes to `distil_decoder`. Returns what was written."""
    from twostep import __version__
    from twostep.distill.decoder import distil_decoder
    from twostep.models.loading import load_bundle

    teacher = load_bundle(settings.model)
    source = _source(settings, teacher, folder.path, advance)
    return distil_decoder(
        settings,
        teacher,
        source,
        folder,
        version=__version__,
        recipe_name=recipe_name,
        **more,
    )


def report(
    run: Annotated[
        list[Path] | None,
        typer.Argument(help="The folder of a `twostep distill`, or several to compare."),
    ] = None,
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
    """Make one HTML page of a run, or find the weight at which a LoRA is best on other bases.

    The page can be made while the run goes on. Of several runs it lays the curves over each other,
    and lies in the folder of the first.
    """
    if run and lora is None:
        from twostep.reports.run_page import write_report

        _find_modules_here()
        typer.echo(f"written: {write_report(run[0], run[1:])}")
    elif lora is not None and not run:
        from twostep.data.drawn import read_prompts
        from twostep.reports.portability import PROMPTS, print_scales

        chosen = PROMPTS if prompts is None else read_prompts(prompts)
        print_scales(lora, bases.split(","), chosen)
    else:
        raise typer.BadParameter("give the folder of a run, or --lora and --bases.")


def _find_modules_here() -> None:
    """Let recipes name modules in the folder that the command is run in."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _load_recipe(name: str, overrides: list[str] | None) -> DistillRecipe | DecoderRecipe:
    """Read a recipe of distillation, whose method or data may be a module in this folder."""
    from twostep.distill import DistillRecipe
    from twostep.distill.decoder import DecoderRecipe
    from twostep.distill.decoder.recipe import is_decoder_recipe
    from twostep.training.recipe import find_recipe, load_recipe

    _find_modules_here()
    path = find_recipe(name)
    if is_decoder_recipe(path):
        return load_recipe(path, DecoderRecipe, overrides or [])
    return load_recipe(path, DistillRecipe, overrides or [])


def _recipe_of(
    name: str | None, model: str | None, overrides: list[str] | None
) -> tuple[str, DistillRecipe | DecoderRecipe]:
    """Return what is distilled, and the name of its recipe.

    Args:
        name: of the recipe, or its path. Of a decoder it may be missing: then it is the model's
            own recipe, or else that of SDXL.
        model: whose decoder is distilled; None for what the recipe says.
        overrides: of the recipe.
    """
    from twostep.distill.decoder import DecoderRecipe
    from twostep.training.recipe import RecipeError, recipe_names

    if model is None:
        if name is None:
            raise typer.BadParameter("give a recipe, or --decoder MODEL.")
        return Path(name).stem, _load_recipe(name, overrides)
    if name is None:
        own = f"{model}-decoder"
        name = own if own in recipe_names() else "sdxl-decoder"
    settings = _load_recipe(name, [f"model={json.dumps(model)}", *(overrides or [])])
    if not isinstance(settings, DecoderRecipe):
        raise RecipeError(
            f"{name} is no recipe of a decoder: it has no table [decoder]. Leave --decoder out, or "
            "give another, such as sdxl-decoder."
        )
    return Path(name).stem, settings


_BUILTIN_DATA = "twostep.pretrain.latents:builtin"
"""Makes the source of the built-in drawings, which travel with the package."""


def _source(settings: RunRecipe, teacher: Bundle, out: Path, advance: OnProgress) -> Source:
    """Return what the recipe learns from: a cache, or what its function makes of the teacher."""
    from twostep.data.ahead import ReadAhead
    from twostep.data.cache import load_cache
    from twostep.distill.recipe import BUILTIN
    from twostep.training.recipe import RecipeError

    if settings.data is None:
        raise RecipeError(
            "this recipe has no data: make some with `twostep cache`, and say -o data=FOLDER."
        )
    if settings.cache is not None:
        unknown = settings.data_options.keys() - {"caption_dropout"}
        if unknown:
            raise RecipeError(
                f"data_options has {', '.join(sorted(unknown))}, but data is a cache, which has "
                "only caption_dropout."
            )
        dropout = float(settings.data_options.get("caption_dropout", 0.0))
        return ReadAhead(load_cache(settings.cache, teacher, caption_dropout=dropout))
    try:
        make = resolve_name(_BUILTIN_DATA if settings.data == BUILTIN else settings.data)
    except (ModuleNotFoundError, AttributeError) as error:
        raise RecipeError(
            f'data = "{settings.data}" is not to be found from {Path.cwd()} ({error}).'
        ) from error
    source: Source = make(teacher, out, advance, **settings.data_options)
    return source


def _print_line(line: str | None) -> None:
    if line is not None:
        typer.echo(line, err=True)


def _has_terminal() -> bool:
    """Whether what is written to standard error is shown on a terminal."""
    from rich.console import Console

    return Console(stderr=True).is_terminal


@contextmanager
def progress_bar(title: str, shown: bool = True, *, lines: bool = True) -> Iterator[OnProgress]:
    """Show a bar with counts and the time that remains; yields the function that moves it.

    Args:
        title: what is done.
        shown: whether to show anything.
        lines: whether to print a line now and then where there is no terminal for a bar.
    """
    if not _has_terminal():
        yield _line_printer(title) if shown and lines else lambda done, total, text: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int | None, text: str) -> None:
            description = f"{title} {text}".strip()
            bar.update(task, completed=done, total=total, description=description)

        yield advance


def _line_printer(title: str) -> OnProgress:
    """Return what prints a line about the progress, at most every half minute."""
    last_at = time.monotonic()

    def advance(done: int, total: int | None, text: str) -> None:
        nonlocal last_at
        if time.monotonic() - last_at < _SECONDS_BETWEEN_LINES:
            return
        last_at = time.monotonic()
        of_total = "" if total is None else f"/{total}"
        typer.echo(f"{title} {done}{of_total} {text}".rstrip(), err=True)

    return advance
