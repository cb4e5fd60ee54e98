"""Every workflow that we give away is one that ComfyUI takes: against the definitions of its nodes,
and of ours.
"""

import copy
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comfyui import graph
from twostep.contract import Contract
from twostep.diffusion import VariancePreserving
from twostep.export.writing import export

from .conftest import Shelf, student_of

ROOT = Path(graph.__file__).parent
KNOWN = graph.definitions()
NAMES = sorted(path.name for path in (ROOT / "workflows" / "api").glob("*.json"))


def api(name: str = "checkpoint.json") -> graph.Workflow:
    return json.loads((ROOT / "workflows" / "api" / name).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_our_workflows_are_valid_in_both_forms(name: str) -> None:
    page = json.loads((ROOT / "workflows" / name).read_text())
    assert graph.problems(api(name), KNOWN) == []
    assert graph.page_problems(page, KNOWN) == []
    assert graph.from_page(page, KNOWN) == api(name)
    assert page == graph.to_page(api(name), KNOWN), "run python -m comfyui.graph"
    places = [tuple(node["pos"]) for node in page["nodes"]]
    assert len(set(places)) == len(places), "nodes lie upon each other"


def test_there_is_one_for_every_kind() -> None:
    files = {name: api(name)["1"]["inputs"]["file"].partition("/") for name in NAMES}
    assert {folder for folder, _, _ in files.values()} == {
        "checkpoints",
        "diffusion_models",
        "loras",
    }
    assert any("1step" in file and "x0" in file for _, _, file in files.values())
    assert {node["class_type"] for name in NAMES for node in api(name).values()} >= {
        *("TwostepLoader", "TwostepStudentSwitch", "TwostepContract")
    }


BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "an unknown node": (
        lambda g: g["1"].update(class_type="TwostepLoder"),
        "there is no TwostepLoder",
    ),
    "a missing input": (
        lambda g: g["6"]["inputs"].pop("sigmas"),
        "(SamplerCustom): sigmas is missing",
    ),
    "a foreign input": (lambda g: g["4"]["inputs"].update(depth=1), "has no input depth"),
    "a link to nowhere": (
        lambda g: g["7"]["inputs"].update(vae=["99", 2]),
        "node 99, which is not there",
    ),
    "an output too far": (lambda g: g["7"]["inputs"].update(vae=["1", 6]), "which has 6"),
    "a link of another type": (
        lambda g: g["7"]["inputs"].update(vae=["1", 0]),
        "vae is VAE, node 1 gives MODEL",
    ),
    "steps for cfg": (
        lambda g: g["6"]["inputs"].update(cfg=["1", 4]),
        "cfg is FLOAT, node 1 gives INT",
    ),
    "a value for a link": (
        lambda g: g["6"]["inputs"].update(model="m"),
        "model is MODEL and needs a link",
    ),
    "another type": (lambda g: g["4"]["inputs"].update(width="1024"), "width is INT, not '1024'"),
    "a truth for a number": (
        lambda g: g["4"]["inputs"].update(batch_size=True),
        "batch_size is INT, not True",
    ),
    "out of range": (
        lambda g: g["4"]["inputs"].update(width=8),
        "width lies in 16..16384, not at 8",
    ),
    "a choice that is none": (
        lambda g: g["5"]["inputs"].update(sampler_name="euler_x"),
        "'euler_x'",
    ),
    "nothing out": (lambda g: g.pop("8"), "no node gives anything out"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_found(what: str) -> None:
    broken = copy.deepcopy(api())
    BROKEN[what][0](broken)
    listed = graph.problems(broken, KNOWN)
    assert len(listed) == 1 and BROKEN[what][1] in listed[0], listed


def test_what_is_wrong_on_the_page_is_found() -> None:
    page = graph.to_page(api(), KNOWN)
    for change, message in (
        (lambda p: p["links"][0].__setitem__(5, "VAE"), "do not agree"),
        (lambda p: p["nodes"][0]["outputs"][0]["links"].clear(), "do not agree"),
        (
            lambda p: p["nodes"][0]["outputs"].append({"name": "x", "type": "X", "links": []}),
            "has outputs",
        ),
        (lambda p: p["nodes"][-1].update(type="Nothing", widgets_values=[]), "there is no Nothing"),
    ):
        broken = copy.deepcopy(page)
        change(broken)
        assert any(message in problem for problem in graph.page_problems(broken, KNOWN)), message


@pytest.mark.parametrize(
    ("target", "steps"),
    [("comfyui", 4), ("unet", 4), ("lora-kohya", 4), ("comfyui", 1), ("unet", 1)],
)
def test_exported_workflows_are_valid(
    target: str, steps: int, shelf: Shelf, tmp_path: Path
) -> None:
    path = source(shelf, target, student_of(steps))
    out = tmp_path / "out" / "model.safetensors"
    export(
        path,
        target,
        out,
        steps=None if target.startswith("lora") else steps,
        base=base_of(shelf, target),
    )
    written = [json.loads(file.read_text()) for file in out.parent.glob("*.json")]
    flows = [
        workflow
        for workflow in written
        if "nodes" in workflow or any("class_type" in part for part in workflow.values())
    ]
    assert flows
    for flow in flows:
        assert (graph.page_problems if "nodes" in flow else graph.problems)(flow, KNOWN) == []
        nodes = graph.from_page(flow, KNOWN) if "nodes" in flow else flow
        sampler = next(
            node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler"
        )
        settings = [
            sampler[name] for name in ("steps", "cfg", "sampler_name", "scheduler", "denoise")
        ]
        assert settings == [steps, 1.0, "euler", "simple", 1.0]
        kinds = {node["class_type"]: node["inputs"] for node in nodes.values()}
        assert ("ModelSamplingDiscrete" in kinds) == (steps == 1)
        loader = {
            "comfyui": "CheckpointLoaderSimple",
            "unet": "UNETLoader",
            "lora-kohya": "LoraLoader",
        }[target]
        assert out.name in kinds[loader].values()


def source(shelf: Shelf, target: str, contract: Contract) -> Path:
    """A small student to export, as the file that the target is made from."""
    if target.startswith("lora"):
        return shelf.lora("l", student_of(contract.steps, lora_rank=2, lora_alpha=1.0))
    path = shelf.checkpoint("c", contract)
    shelf.configs(path)
    return path


def base_of(shelf: Shelf, target: str) -> str | None:
    """The model with a LoRA's layers."""
    if not target.startswith("lora"):
        return None
    path = shelf.checkpoint("base")
    shelf.configs(path)
    return str(path)


def test_the_registry_takes_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, comfy = settings["project"], settings["tool"]["comfy"]
    assert (
        re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"])
        and len(project["name"]) < 100
    )
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"] == {"text": "Apache-2.0"} and "Repository" in project["urls"]
    assert any(need.startswith("twostep") for need in project["dependencies"])
    assert {"PublisherId", "DisplayName"} <= comfy.keys()
    needs = (ROOT / "requirements.txt").read_text().split()
    assert needs == project["dependencies"], (
        "ComfyUI-Manager installs requirements.txt, the registry the other"
    )


@pytest.mark.parametrize("target", ["comfyui", "unet"])
def test_a_student_of_3_steps_has_its_levels_written_out(
    target: str, shelf: Shelf, tmp_path: Path
) -> None:
    """`simple` would visit the time 334 in the place of 333."""
    out = tmp_path / "out" / "model.safetensors"
    export(source(shelf, target, student_of(3)), target, out, steps=3, base=base_of(shelf, target))
    api_flow = json.loads(out.with_suffix(".api.json").read_text())
    assert graph.problems(api_flow, KNOWN) == []
    page = json.loads(out.with_suffix(".json").read_text())
    assert graph.page_problems(page, KNOWN) == []
    assert graph.from_page(page, KNOWN) == dict(sorted(api_flow.items(), key=lambda n: int(n[0])))
    kinds = {node["class_type"]: node["inputs"] for node in api_flow.values()}
    assert "KSampler" not in kinds
    schedule = VariancePreserving.scaled_linear()
    ratio = schedule.sigmas / schedule.alphas
    written = [float(level) for level in kinds["ManualSigmas"]["sigmas"].split(", ")]
    assert written == pytest.approx([ratio[t].item() for t in (1000, 667, 333, 0)], abs=1e-8)
    assert kinds["KSamplerSelect"] == {"sampler_name": "euler"}
    assert "ManualSigmas" in out.with_suffix(".md").read_text()
