"""`twostep reproduce`: a table from the drawings up, or from the weights in the package.

What a table holds is a TOML file in `tables/`: the parts of the built-in model, and the recipes
whose students are its rows. Every step has its own folder and resumes there; what is finished is
noted in `finished.json` with the seconds it took, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from twostep import __version__
from twostep.distill import DistillRecipe, distil
from twostep.distill.recipe import BUILTIN
from twostep.evaluate.measurements import SecondJudge
from twostep.files import write_atomically
from twostep.models.loading import load_bundle
from twostep.pretrain.drawings import load_drawings
from twostep.pretrain.latents import builtin
from twostep.pretrain.parts import load_part
from twostep.reports.benchmark import NUM_PICTURES
from twostep.reports.comparison import Comparison, OnProgress, compare
from twostep.training.recipe import RecipeError, Settings, load_recipe
from twostep.training.run_folder import RunFolder

TABLES = Path(__file__).with_name("tables")
"""The tables of the package."""

_FINISHED = "finished.json"


class PartOfTable(Settings):
    """A part of the built-in model that has to be trained."""

    recipe: str = Field(description="a recipe of `twostep pretrain`, by name or path")
    minutes: float = Field(gt=0, description="how long it takes on two CPU cores")
    inputs: dict[str, str] = Field({}, description="keys of the recipe -> parts whose model it is")
    overrides: tuple[str, ...] = Field((), description="key.path=value, other values of the recipe")


class RowOfTable(Settings):
    """A recipe whose students are rows of the table."""

    recipe: str = Field(description="a recipe of `twostep distill`, by name or path")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="each is a training of its own")
    minutes: float | None = Field(
        None, gt=0, description="how long one seed takes on two CPU cores; left out if not measured"
    )
    overrides: tuple[str, ...] = Field((), description="key.path=value, other values of the recipe")


class Table(Settings):
    """What a table is made of."""

    weights: str = Field(description="the model that --from-weights draws with")
    teacher: str = Field(description="the part that is distilled")
    judge: str = Field(description="the part that judges")
    parts: tuple[PartOfTable, ...] = Field(min_length=1, description="in order")
    rows: tuple[RowOfTable, ...] = Field(min_length=1, description="the trainings of its rows")


@dataclass(frozen=True, eq=False)
class Step:
    """One training on the way to a table.

    Attributes:
        name: of its folder.
        minutes: how long it takes on two CPU cores; None if that was not measured yet.
        run: trains it, or goes on; takes what shows its progress.
    """

    name: str
    minutes: float | None
    run: Callable[[OnProgress], None]


class Reproduction:
    """The way to one table, in one folder.

    Attributes:
        table: what it is made of.
        out: the folder.
        steps: the trainings, in order.
        finished: seconds that each finished step took, by name.
    """

    def __init__(self, table: Table, out: Path) -> None:
        """Read what is finished; RecipeError if the table names a part or a recipe that is not."""
        self.table = table
        self.out = out
        self.runs = [
            (row, seed, out / f"{Path(row.recipe).stem}-seed{seed}")
            for row in table.rows
            for seed in row.seeds
        ]
        self._check()
        parts = [Step(Path(p.recipe).stem, p.minutes, self._part(p)) for p in table.parts]
        chains = [
            Step(folder.name, row.minutes, self._chain(row, seed, folder))
            for row, seed, folder in self.runs
        ]
        self.steps = (*parts, *chains)
        path = out / _FINISHED
        self.finished: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def remaining_minutes(self) -> float:
        """Return how long the trainings that are left will take, as fast as those before.

        Those whose time was not measured yet do not count; `num_unmeasured` tells how many.
        """
        expected = 0.0
        taken = 0.0
        left = 0.0
        for step in self.steps:
            if step.minutes is None:
                continue
            if step.name in self.finished:
                expected += step.minutes
                taken += self.finished[step.name] / 60
            else:
                left += step.minutes
        return left * (taken / expected if expected else 1.0)

    @property
    def num_unmeasured(self) -> int:
        """How many trainings are left of which nobody knows how long they take."""
        return sum(s.minutes is None and s.name not in self.finished for s in self.steps)

    def train(
        self,
        on_progress: OnProgress = lambda done, total, words: None,
        on_step: Callable[[Step, float], None] = lambda step, minutes: None,
    ) -> None:
        """Train what is not finished.

        Args:
            on_progress: told of every iteration.
            on_step: told of every step before it begins, with the minutes that all will take.

        Raises:
            RunError: a folder holds a run of another recipe.
            TrainingError: a loss is not finite, or health asks for a pause.
        """
        for step in self.steps:
            if step.name in self.finished:
                continue
            on_step(step, self.remaining_minutes())
            began = time.monotonic()
            step.run(on_progress)
            self.finished[step.name] = round(time.monotonic() - began, 1)
            with write_atomically(self.out / _FINISHED) as file:
                file.write(json.dumps(self.finished, indent=2).encode())

    def compare(self, **options: Any) -> Comparison:
        """Measure the students that were trained; options are those of `comparison.compare`."""
        return compare(
            [str(folder) for _, _, folder in self.runs],
            judge=self.out / self.table.judge / "judge.safetensors",
            cache=self.out / "pictures",
            **options,
        )

    def _check(self) -> None:
        """Check that every recipe can be read, before hours are spent: RecipeError."""
        names = [Path(part.recipe).stem for part in self.table.parts]
        for i, part in enumerate(self.table.parts):
            for key, other in part.inputs.items():
                if other not in names[:i]:
                    raise RecipeError(
                        f"part {part.recipe}: {key} = {other!r} is no part before it; there are "
                        f"{', '.join(names[:i]) or 'none'}."
                    )
            load_part(part.recipe, part.overrides)
        for what in (self.table.teacher, self.table.judge):
            if what not in names:
                raise RecipeError(f"the table has no part {what!r}; it has {', '.join(names)}.")
        for row in self.table.rows:
            recipe = load_recipe(row.recipe, DistillRecipe, row.overrides)
            if recipe.data != BUILTIN or recipe.starts_apart or recipe.model_steps is not None:
                raise RecipeError(
                    f"row {row.recipe}: a table is made of recipes that start from the teacher on "
                    'data = "builtin".'
                )

    def _part(self, part: PartOfTable) -> Callable[[OnProgress], None]:
        def run(on_progress: OnProgress) -> None:
            inputs = [f'{key}="{self.out / other / "model"}"' for key, other in part.inputs.items()]
            loaded = load_part(part.recipe, [*part.overrides, *inputs])
            loaded.train(load_drawings(), self.out / loaded.name, on_progress)

        return run

    def _chain(self, row: RowOfTable, seed: int, folder: Path) -> Callable[[OnProgress], None]:
        def run(on_progress: OnProgress) -> None:
            teacher = self.out / self.table.teacher / "model"
            recipe = load_recipe(
                row.recipe,
                DistillRecipe,
                [*row.overrides, f'model="{teacher}"', f"defaults.seed={seed}"],
            )
            run_folder = RunFolder(folder, recipe)
            bundle = load_bundle(recipe.model)
            options: dict[str, Any] = dict(recipe.data_options)
            source = builtin(bundle, folder, on_progress, **options)
            distil(
                recipe,
                bundle,
                source,
                run_folder,
                version=__version__,
                recipe_name=Path(row.recipe).stem,
                on_iteration=lambda stage, done, figures: on_progress(
                    done, stage.iterations, stage.name
                ),
            )

        return run


def table_names() -> list[str]:
    """Return the names of the tables in the package."""
    return sorted(path.stem for path in TABLES.glob("*.toml"))


def load_table(name: str) -> Table:
    """Read a table by name or path; RecipeError lists those that there are."""
    for path in (TABLES / f"{name}.toml", Path(name)):
        if path.is_file():
            return load_recipe(path, Table)
    raise RecipeError(
        f"There is no table '{name}'. Built in: {', '.join(table_names())}; or give the path of a "
        "TOML file."
    )


def compare_weights(
    table: Table,
    out: Path,
    *,
    num_pictures: int = NUM_PICTURES,
    second: SecondJudge | None = None,
    device: str = "auto",
    on_progress: OnProgress = lambda done, total, words: None,
) -> Comparison:
    """Measure the students in the package that the table's weights name."""
    return compare(
        [table.weights],
        num_pictures=num_pictures,
        second=second,
        device=device,
        cache=out / "pictures",
        on_progress=on_progress,
    )


def in_words(minutes: float) -> str:
    """Return a time as "25 minutes" or "4.8 hours"."""
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
