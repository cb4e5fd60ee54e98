"""The settings of a server: read from a file, refused by name, and under the flags."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from twostep.cli import app as cli
from twostep.contract import ContractError
from twostep.pipeline.request import RequestError
from twostep.serve import start
from twostep.serve.catalogue import Catalogue, Wish
from twostep.serve.config import Bounds, FilterSettings, ServeSettings, read_settings
from twostep.training.recipe import RecipeError

FULL = """
models = ["nano", "tiny"]
model_folders = ["models"]
controlnets = ["silhouette"]
memory = "1.5GB"
engine = "openvino"
queue = 3
strict = true
origins = ["https://draw.example"]
log_format = "json"

[limits]
steps = 40
body = "8MiB"

[filter]
model = "guard"
verdicts = {nsfw = "refuse", drawing = "keep"}

[cluster]
max_replicas = 3
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_and_flags_win(tmp_path: Path) -> None:
    flags = {"queue": 5, "strict": False, "host": None, "models": ("base",)}
    settings = read_settings(written(tmp_path, FULL), flags)
    assert (settings.queue, settings.strict, settings.models) == (5, False, ("base",))
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.model_folders == (Path("models"),)
    assert settings.memory == 1_500_000_000
    assert (settings.engine, ServeSettings().engine) == ("openvino", "eager")
    assert (settings.limits.steps, settings.limits.body) == (40, 8 * 1024 * 1024)
    assert settings.filter is not None
    assert settings.filter.verdicts["nsfw"] == "refuse"
    assert settings.cluster is not None
    assert (settings.cluster.min_replicas, settings.cluster.max_replicas) == (1, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("modles = ['nano']", "modles: no such key. Did you mean 'models'?"),
        ("zzz = 1", "zzz: no such key. Known keys: models, model_folders, loras,"),
        ("[limits]\npixels = 1", "limits.pixels: no such key."),
        ("queue = 0", "queue: Input should be greater than or equal to 1 (given: 0)"),
        ("memory = '24'", "memory: 24 is no size; write 24GB"),
        ("origins = ['*']", "origins: '*' is no origin; write it as https://draw.example"),
        ("origins = ['https://a.b/c']", "'https://a.b/c' is no origin"),
        ("[filter]", "filter: give either the model of a classifier or a function"),
        ("[filter]\nmodel = 'x'", "filter: a model needs verdicts"),
        ("[filter]\nfunction = '/etc/passwd'", "filter.function: String should match pattern"),
        ("[cluster]\nmin_replicas = 3", "cluster: min_replicas is 3, above max_replicas, 2"),
        ("= 1", "is not valid TOML"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_settings(written(tmp_path, text), {})
    assert said in str(caught.value)


def test_the_settings_of_the_docs_are_read_and_every_key_is_told_there(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    settings = read_settings(written(tmp_path, text), {})
    assert settings.cluster is not None
    assert settings.cluster.max_replicas == 4
    for model in (ServeSettings, Bounds, FilterSettings):
        for key in model.model_fields:
            assert re.search(rf"\b{key}\b", page), key


def test_the_verb_hands_over_file_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ServeSettings] = []

    def run(settings: ServeSettings, say: Any) -> None:
        seen.append(settings)

    monkeypatch.setattr(start, "run", run)
    path = str(written(tmp_path, "port = 9000\nmodels = ['tiny']\nstrict = true"))
    for words in ([], ["base", "--port", "0", "--no-strict", "--memory", "2GB"]):
        answer = CliRunner().invoke(cli, ["serve", *words, "--config", path])
        assert answer.exit_code == 0, answer.output
    assert [(each.models, each.port, each.strict, each.memory) for each in seen] == [
        (("tiny",), 9000, True, None),
        (("base",), 0, False, 2e9),
    ]
    answer = CliRunner().invoke(cli, ["serve", "--config", str(tmp_path / "none.toml")])
    assert answer.exit_code == 1
    assert "none.toml cannot be read: No such file or directory" in answer.output.replace("\n", "")


def test_jobs_are_drawn_with_the_engine_of_the_server() -> None:
    for engine in ("eager", "openvino"):
        catalogue = Catalogue(["nano"], engine=engine)
        assert catalogue.fit(Wish("apple"), strict=False).request.engine == engine


def test_limits_bound_what_a_job_may_ask_for() -> None:
    catalogue = Catalogue(["nano"], bounds=Bounds(num_images=2, prompt_letters=5))
    with pytest.raises(RequestError, match="at most 5"):
        catalogue.fit(Wish("an apple"), strict=False)
    with pytest.raises(RequestError, match="1 to 2"):
        catalogue.fit(Wish("apple", num_images=3), strict=False)
    limits = catalogue.describe()["limits"]
    assert limits == {"num_images": 2, "prompt_letters": 5, "steps": 150, "controls": 4}


def test_steps_of_a_teacher_alone_are_bounded(tmp_path: Path) -> None:
    # Without its students nano takes any number of steps.
    import twostep

    nano = Path(twostep.__file__).parent / "weights" / "nano"
    folder = tmp_path / "teacher"
    folder.mkdir()
    for path in nano.iterdir():
        if path.name != "students":
            (folder / path.name).symlink_to(path)
    catalogue = Catalogue([str(folder)], bounds=Bounds(steps=40))
    fitted = catalogue.fit(Wish("apple", steps=1000), strict=False)
    assert fitted.request.steps == 40
    assert fitted.changes == ["at most 40 steps are drawn here, not 1000"]
    with pytest.raises(ContractError, match="at most 40"):
        catalogue.fit(Wish("apple", steps=41), strict=True)


def test_controlnets_are_named_like_models() -> None:
    catalogue = Catalogue(["nano"], controlnets=["silhouette", "nets/edges.safetensors"])
    assert catalogue.controlnets == ["silhouette", "edges"]
    assert catalogue.find_controlnet("edges") == "nets/edges.safetensors"
    for name in ("nets/edges.safetensors", "../silhouette"):
        with pytest.raises(RequestError, match="there are silhouette, edges"):
            catalogue.find_controlnet(name)
    with pytest.raises(RequestError, match="two ControlNets are called edges"):
        Catalogue(["nano"], controlnets=["edges", "more/edges.safetensors"])
