"""Few-step models of others: found by what they are called, drawn as that means, held to their
steps where somebody says so.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from twostep.contract import ContractError
from twostep.formats.contracts import SDXL, single_file_contract
from twostep.formats.few_step import KINDS, as_student, detect, drawn_as, note
from twostep.formats.header import read_header
from twostep.formats.single_file import NAMES


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("dreamshaperXL_lightningDPMSDE", {}, ("lightning", 4)),
        ("RealVisXL_V5.0_Lightning_fp16", {}, ("lightning", 4)),
        ("juggernaut-lightning-8step", {}, ("lightning", 8)),
        ("sd_xl_turbo_1.0_fp16", {}, ("turbo", 4)),
        ("turboVisionXL", {}, ("turbo", 4)),
        ("some_lcm_merge", {}, ("lcm", 4)),
        ("epicrealismXL_vxviLCM", {}, ("lcm", 4)),
        ("juggernautXL_hyper_4steps", {}, ("hyper", 4)),
        ("Hyper-SDXL-merge", {}, ("hyper", 8)),
        ("sdxl-dmd2-merge", {}, ("dmd2", 4)),
        ("mine", {"modelspec.title": "A Lightning merge, 2 steps"}, ("lightning", 2)),
        ("mine", {"ss_output_name": "my_dmd2"}, ("dmd2", 4)),
        ("juggernaut-lightning-300steps", {}, ("lightning", 4)),
        ("sd_xl_base_1.0", {}, None),
        ("hyperrealismXL", {}, None),
        ("velcmore_v2", {}, None),
        ("mine", {"description": "lightning in the sky"}, None),
    ],
)
def test_names_and_metadata_say_the_kind(
    name: str, metadata: dict[str, str], expected: tuple[str, int] | None
) -> None:
    assert detect(name, metadata) == expected


def whole(path: Path) -> Path:
    """A file that has the first key of every part, which is all that its contract is read of."""
    save_file({f"{part}x": torch.ones(1) for part in NAMES}, path)
    return path


def test_a_file_is_drawn_as_its_name_says_and_may_be_asked_for_more(tmp_path: Path) -> None:
    lightning = single_file_contract(read_header(whole(tmp_path / "x_Lightning.safetensors")))
    plain = single_file_contract(read_header(whole(tmp_path / "plain.safetensors")))
    assert (plain.role, plain.steps, plain.guidance) == ("teacher", 32, 6.0)
    assert (lightning.role, lightning.steps, lightning.guidance) == ("teacher", 4, 1.0)
    assert (lightning.sampler, lightning.trained_times) == ("euler", ())
    assert lightning.check(20, 2.0, None, None) == []
    said = note(lightning)
    assert said is not None and "--as lightning --steps 4" in said and "--as base" in said
    assert note(plain) is None


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [
        ("lightning", "euler"),
        ("hyper", "euler"),
        ("turbo", "renoise"),
        ("lcm", "renoise"),
        ("dmd2", "renoise"),
    ],
)
def test_whoever_says_the_kind_gets_a_student_that_is_strict(kind: str, sampler: str) -> None:
    student = as_student(SDXL, SDXL, kind, 4)
    assert (student.role, student.steps, student.guidance) == ("student", 4, 1.0)
    assert (student.sampler, student.trained_times) == (sampler, (1000, 750, 500, 250))
    with pytest.raises(ContractError, match="draws in exactly 4 steps; asked for 20"):
        student.check(20, None, None, None)
    with pytest.raises(ContractError, match=r"trained to draw with .*; asked for unipc"):
        student.check(4, None, None, None, sampler="unipc")
    with pytest.raises(ContractError, match=r"steps; asked for 50"):
        as_student(SDXL, SDXL, kind, 50)
    assert as_student(SDXL, SDXL, kind, None).steps == KINDS[kind].steps[0]


def test_as_base_undoes_what_a_name_says() -> None:
    turbo = drawn_as(SDXL, "turbo", 4)
    assert turbo.sampler == "renoise"
    assert as_student(turbo, SDXL, "base", 20) == SDXL


def test_what_cannot_be_treated_is_told() -> None:
    with pytest.raises(ContractError, match="no kind 'slow'; there are lightning, turbo, lcm"):
        as_student(SDXL, SDXL, "slow", None)
    student = as_student(SDXL, SDXL, "lightning", 4)
    with pytest.raises(ContractError, match="is a student and says itself how it is drawn"):
        as_student(replace(student, name="mine"), SDXL, "lcm", 4)
