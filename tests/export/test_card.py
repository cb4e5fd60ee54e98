"""Cards say what a person must know, and workflows are whole: every link leads from an output to an
input.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from twostep.export.card import Card
from twostep.export.writing import export
from twostep.formats.lora_files import write_lora
from twostep.models.bundle import Bundle

from .conftest import random_lora, student_contract

KNOWN = json.loads((Path(__file__).parents[2] / "twostep" / "export" / "nodes.json").read_text())


def test_a_card_has_recipe_figures_pictures_and_licence(tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(
        '[{"steps": 4, "concept": "99.2 %"}, {"steps": 2, "concept": "98.4 %"}]'
    )
    Image.new("RGB", (9, 5), "red").save(tmp_path / "grid.png")
    card = Card(tmp_path / "grid.png", evaluation=tmp_path / "eval.json", license="apache-2.0")
    out = export("nano", "diffusers", tmp_path / "out", steps=2, card=card)
    text = (out / "README.md").read_text()
    head = ModelCard(text).data.to_dict()
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == (
        "apache-2.0",
        "diffusers",
        "text-to-image",
    )
    assert "| steps | concept |\n|---|---|\n| 4 | 99.2 % |\n| 2 | 98.4 % |" in text
    assert 'objective = "unconditional"' in text  # of the recipe
    assert "![What it draws](grid.png)" in text
    assert "num_inference_steps=2" in text and "| trained times | (1000, 750, 500, 250) |" in text
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (9, 5)


def test_of_the_base_of_sdxl_the_licence_is_known_and_a_picture_can_be_given(
    folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "mine.png")
    lora = {key: low for key, low in random_lora(bundle).items() if key.startswith("unet.")}
    carried = student_contract(bundle.contract, 2, rank=3).to_metadata()
    carried = {
        key: value.replace('"base": "random"', '"base": "stable-diffusion-xl-base-1.0"')
        for key, value in carried.items()
    }
    save_file(write_lora(lora, bundle.parts, "kohya")[0], tmp_path / "in.safetensors", carried)
    card = Card(picture=tmp_path / "mine.png")
    export(
        tmp_path / "in.safetensors",
        "lora-peft",
        tmp_path / "out.safetensors",
        base=str(folder),
        card=card,
    )
    head = ModelCard((tmp_path / "out.md").read_text()).data.to_dict()
    assert (head["license"], head["base_model"]) == (
        "openrail++",
        "stabilityai/stable-diffusion-xl-base-1.0",
    )
    assert "lora" in head["tags"]
    with Image.open(tmp_path / "out.png") as shown:
        assert shown.size == (8, 8)
    assert "Recipe: none." in (tmp_path / "out.md").read_text()


def follow(api: dict[str, Any], name: str) -> list[str]:
    """The kinds of nodes that a picture's model went through, from the sampler up."""
    node = api[name]
    start = node["inputs"].get("model")
    return [node["class_type"], *(follow(api, start[0]) if start else [])]


@pytest.mark.parametrize(
    ("to", "steps", "chain"),
    [
        ("comfyui", 4, ["KSampler", "CheckpointLoaderSimple"]),
        ("comfyui", 1, ["KSampler", "ModelSamplingDiscrete", "CheckpointLoaderSimple"]),
        ("unet", 4, ["KSampler", "UNETLoader"]),
        ("unet", 1, ["KSampler", "ModelSamplingDiscrete", "UNETLoader"]),
        ("lora-kohya", 4, ["KSampler", "LoraLoader", "CheckpointLoaderSimple"]),
    ],
)
def test_workflows_sample_as_the_contract_says(
    to: str, steps: int, chain: list[str], folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    model: Path | str = folder
    if to == "lora-kohya":
        model, contract = (
            tmp_path / "in.safetensors",
            student_contract(bundle.contract, steps, rank=3),
        )
        save_file(
            write_lora(random_lora(bundle), bundle.parts, "kohya")[0], model, contract.to_metadata()
        )
    export(
        model,
        to,
        tmp_path / "x y.safetensors",
        steps=None if to == "lora-kohya" else steps,
        base=str(folder),
    )
    api, page = (json.loads((tmp_path / f"x y{end}").read_text()) for end in (".api.json", ".json"))
    sampler = next(node["inputs"] for node in api.values() if node["class_type"] == "KSampler")
    assert (sampler["steps"], sampler["sampler_name"], sampler["scheduler"]) == (
        steps,
        "euler",
        "simple",
    )
    assert sampler["cfg"] == 1.0 and sampler["denoise"] == 1.0
    assert follow(api, "7") == chain
    assert "x y.safetensors" in json.dumps(api)
    if steps == 1:
        assert api["3"]["inputs"] == {
            "model": [api["3"]["inputs"]["model"][0], 0],
            "sampling": "x0",
            "zsnr": False,
        }
    for node in api.values():
        kind = KNOWN[node["class_type"]]
        assert sorted(node["inputs"]) == sorted({*kind["inputs"], *kind["widgets"]} - {"fixed"})
    check_page(api, page)


def check_page(api: dict[str, Any], page: dict[str, Any]) -> None:
    """Both ends of every link agree, and the page says what the API's form says."""
    nodes = {str(node["id"]): node for node in page["nodes"]}
    assert nodes.keys() == api.keys()
    assert page["last_node_id"] == max(map(int, nodes)) and page["last_link_id"] == len(
        page["links"]
    )
    for number, start, output, end, place, kind in page["links"]:
        given, taken = nodes[str(start)]["outputs"][output], nodes[str(end)]["inputs"][place]
        assert (
            number in given["links"]
            and taken["link"] == number
            and given["type"] == taken["type"] == kind
        )
        assert api[str(end)]["inputs"][taken["name"]] == [str(start), output]
    assert sum(len(node["inputs"]) for node in nodes.values()) == len(page["links"])
    for name, node in nodes.items():
        widgets = KNOWN[node["type"]]["widgets"]
        assert node["type"] == api[name]["class_type"]
        widget_values = {
            key: value for key, value in api[name]["inputs"].items() if not isinstance(value, list)
        }
        assert dict(zip(widgets, node["widgets_values"], strict=True)) == (
            widget_values | {"fixed": "fixed"} if "fixed" in widgets else widget_values
        )
