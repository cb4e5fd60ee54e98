"""The contract: round trips, every way a file can be wrong, every way a request can break it."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from twostep import contract as contract_module
from twostep.contract import (
    METADATA_KEY,
    Contract,
    ContractError,
    RectifiedFlowSpec,
    VariancePreservingSpec,
)
from twostep.diffusion import (
    PredictionType,
    RectifiedFlow,
    VariancePreserving,
    find_sampler,
    make_schedule,
)
from twostep.errors import TwostepError

STUDENT = Contract(
    name="nano-2step",
    role="student",
    steps=2,
    trained_times=(1000, 750, 500, 250),
    prediction_type="eps",
    spacing="trailing",
    guidance=1.0,
    sizes=((64, 64), (96, 64)),
    base="nano",
    lora_rank=None,
    lora_alpha=None,
    recipe="nano",
    version="0.1.0",
)
TEACHER = replace(STUDENT, name="nano", role="teacher", steps=32, trained_times=(), guidance=4.0)
LORA = replace(STUDENT, lora_rank=64, lora_alpha=32.0)
OTHER_TIMES = replace(STUDENT, steps=4, sampler="renoise", sampling_times=(1000, 760, 500, 260))
FLOW = replace(
    STUDENT,
    trained_times=(1.0, 0.9, 0.75, 0.5),
    prediction_type="flow",
    family="toy",
    media="video",
    sampler="renoise",
    schedule=RectifiedFlowSpec(shift=3.0),
)
VERSION_2_FIELDS = ("family", "media", "sampler", "schedule", "contract_version")


def changed(**values):
    """A student's JSON with some fields replaced, or dropped where the value is Ellipsis."""
    fields = json.loads(STUDENT.to_json()) | values
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize("contract", [STUDENT, TEACHER, LORA, FLOW, OTHER_TIMES])
def test_json_and_metadata_come_back_equal(contract):
    assert Contract.from_json(contract.to_json()) == contract
    assert Contract.from_metadata(contract.to_metadata() | {"format": "pt"}) == contract


def test_it_survives_a_safetensors_file(tmp_path):
    path = tmp_path / "nano_2step_unet.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata=STUDENT.to_metadata())
    with safe_open(path, framework="pt") as file:
        assert Contract.from_metadata(file.metadata()) == STUDENT


def test_a_whole_number_of_guidance_is_read_as_a_number():
    found = Contract.from_json(changed(guidance=4, role="teacher"))
    assert found.guidance == 4.0 and isinstance(found.guidance, float)


def test_it_is_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        STUDENT.steps = 4
    assert len({STUDENT, replace(STUDENT), TEACHER}) == 2


def test_reading_a_contract_loads_no_torch():
    code = "import sys, twostep.contract; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_its_prediction_types_and_top_time_are_those_of_the_flow():
    assert get_args(contract_module.PredictionType) == get_args(PredictionType)
    assert VariancePreserving.scaled_linear().top == contract_module.TOP_TIME


def test_its_samplers_are_those_of_the_diffusion_room():
    for name in get_args(contract_module.SamplerName):
        assert find_sampler(name)


def test_its_schedules_are_made_by_the_diffusion_room():
    sdxl = make_schedule(**asdict(STUDENT.schedule))
    assert torch.equal(sdxl.alphas, VariancePreserving.scaled_linear().alphas)
    linear = VariancePreservingSpec("linear", 0.001, 0.02, 500)
    made = make_schedule(**asdict(linear))
    assert torch.equal(made.alphas, VariancePreserving.linear(500, 0.001, 0.02).alphas)
    assert make_schedule(**asdict(FLOW.schedule)) == RectifiedFlow(3.0)


def test_version_1_is_read_as_sdxl():
    fields = json.loads(STUDENT.to_json())
    old = json.dumps({name: fields[name] for name in fields if name not in VERSION_2_FIELDS})
    read = Contract.from_json(old)
    assert read == STUDENT
    assert (read.family, read.media, read.sampler) == ("sdxl", "image", "euler")
    assert read.schedule == VariancePreservingSpec("scaled_linear", 0.00085, 0.012, 1000)


def test_new_json_carries_its_version():
    assert json.loads(STUDENT.to_json())["contract_version"] == 2


def test_sampling_times_are_written_only_where_they_say_something():
    """So older readers take every other student, and refuse what they would draw wrongly."""
    assert "sampling_times" not in json.loads(STUDENT.to_json())
    assert json.loads(OTHER_TIMES.to_json())["sampling_times"] == [1000, 760, 500, 260]


def test_sampling_times_are_one_a_step_and_fall():
    for wrong, expected in (
        ((1000, 500, 250), "one time for each of a student's 4 steps"),
        ((1000, 500, 500, 250), "falling from step to step"),
        ((1000, 760, 500, 0), "integer times from 1 to 1000"),
    ):
        with pytest.raises(ContractError, match=expected):
            replace(OTHER_TIMES, sampling_times=wrong)
    with pytest.raises(ContractError, match="one time for each of a student's"):
        replace(TEACHER, steps=2, sampling_times=(1000, 500))


def test_a_version_from_the_future_is_refused_with_what_to_do():
    text = changed(contract_version=3, version="9.9", sampler="heun", unheard_of=1)
    with pytest.raises(
        ContractError, match=r"version 3, written by twostep 9\.9; .* up to 2\. Update"
    ):
        Contract.from_json(text)


def test_times_fit_the_schedule():
    with pytest.raises(ContractError, match=r"trained_times must be integer times from 1 to 500"):
        replace(STUDENT, schedule=VariancePreservingSpec(num_times=500))
    with pytest.raises(ContractError, match=r"trained_times must be times above 0, up to 1"):
        replace(FLOW, trained_times=(1000, 500))


@pytest.mark.parametrize("prediction_type", ["eps", "v"])
def test_a_rectified_flow_predicts_what_is_known_at_every_time(prediction_type):
    with pytest.raises(ContractError, match="must be 'flow' or 'x0' with a rectified flow"):
        replace(FLOW, prediction_type=prediction_type)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (3, "schedule must be an object"),
        (
            {},
            "the kind 'variance_preserving', 'rectified_flow' or 'edm'",
        ),
        ({"kind": "karras"}, "schedule must be an object with the kind 'variance_preserving', "),
        ({"kind": "rectified_flow", "shift": "3"}, "schedule.shift must be a valid number"),
        ({"kind": "rectified_flow", "shift": 0}, "schedule.shift must be a finite number above 0"),
        ({"kind": "rectified_flow", "shft": 3}, "'schedule.shft'; did you mean 'schedule.shift'"),
        (
            {"kind": "variance_preserving", "beta_start": 2.0},
            "schedule.beta_start must be a number between 0 and 1",
        ),
    ],
)
def test_a_wrong_schedule_is_named_with_what_was_expected(schedule, expected):
    with pytest.raises(ContractError) as caught:
        Contract.from_json(changed(schedule=schedule))
    assert expected in str(caught.value)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "modelspec.title": "x"}])
def test_a_foreign_file_is_told_apart(metadata):
    with pytest.raises(ContractError, match="no sampling contract") as caught:
        Contract.from_metadata(metadata)
    assert (", ".join(sorted(metadata)) if metadata else "no metadata at all") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "not json", changed()[:40]])
def test_broken_json_is_shown(text):
    with pytest.raises(ContractError, match="not JSON") as caught:
        Contract.from_metadata({METADATA_KEY: text})
    assert repr(text[:40]) in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"nano"'])
def test_other_json_is_refused(text):
    with pytest.raises(ContractError, match="must be a JSON object"):
        Contract.from_json(text)


@pytest.mark.parametrize(
    "field", [name for name in json.loads(STUDENT.to_json()) if name != "contract_version"]
)
def test_every_missing_field_is_named(field):
    with pytest.raises(ContractError, match=f"lacks {field}"):
        Contract.from_json(changed(**{field: ...}))


def test_an_unknown_field_gets_the_nearest_name_and_the_writer():
    with pytest.raises(
        ContractError, match=r"unknown field 'step'; did you mean 'steps'.*twostep 9.9"
    ):
        Contract.from_json(changed(step=2, version="9.9"))
    with pytest.raises(ContractError, match="unknown field 'qqq'; a contract has name, role"):
        Contract.from_json(changed(qqq=2))


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("name", 3, "a valid string"),
        ("name", " ", "not empty"),
        ("role", "pupil", "'teacher' or 'student'"),
        ("steps", "2", "a valid integer"),
        ("steps", True, "a valid integer"),
        ("steps", 2.0, "a valid integer"),
        ("steps", 0, "from 1 to 1000"),
        ("steps", 1001, "from 1 to 1000"),
        ("trained_times", 500, "a valid array"),
        ("trained_times", [500.5], "integer times from 1 to 1000"),
        ("trained_times", [500.0], "integer times from 1 to 1000"),
        ("trained_times", ["500"], "a valid integer"),
        ("trained_times", [True], "a valid integer"),
        ("trained_times", [0, 500], "times from 1 to 1000"),
        ("trained_times", [1001], "times from 1 to 1000"),
        ("trained_times", [], "at least one time for a student"),
        ("prediction_type", "epsilon", "'eps', 'x0', 'v', 'flow' or 'edm'"),
        ("spacing", "leading", "trailing"),
        ("role", None, "'teacher' or 'student'"),
        ("prediction_type", ["eps"], "'eps', 'x0', 'v', 'flow' or 'edm'"),
        ("guidance", "4", "a valid number"),
        ("guidance", True, "a valid number"),
        ("guidance", 0.5, "1 (none) or more"),
        ("guidance", float("nan"), "a finite number"),
        ("guidance", float("inf"), "a finite number"),
        ("guidance", 4.0, "distilled in"),
        ("sizes", "64x64", "a valid array"),
        ("sizes", [64, 64], "a valid array"),
        ("sizes", [[64, 64, 3]], "pairs with at most 2 items"),
        ("sizes", [[64, "64"]], "a valid integer"),
        ("sizes", [[64, 0]], "at least one pixel"),
        ("sizes", [], "at least one [width, height]"),
        ("base", None, "a valid string"),
        ("lora_rank", "64", "a valid integer"),
        ("lora_rank", 64, "lora_alpha must be a number exactly if lora_rank is one (it is 64)"),
        ("lora_alpha", "64", "a valid number"),
        ("lora_alpha", 64.0, "exactly if lora_rank is one (it is None)"),
        ("recipe", [], "a valid string"),
        ("version", 1, "a valid string"),
        ("family", " ", "a name that is not empty"),
        ("media", "", "one word in small letters"),
        ("media", "Moving Pictures", "one word in small letters"),
        ("sampler", "heun", "'euler' or 'renoise'"),
        ("contract_version", 1, "2"),
        ("contract_version", "2", "2"),
    ],
)
def test_every_wrong_value_is_named_with_what_was_expected(field, value, expected):
    with pytest.raises(ContractError) as caught:
        Contract.from_json(changed(**{field: value}))
    message = str(caught.value)
    assert (
        field in message
        and expected in message
        and (repr(value) in message or isinstance(value, list))
    )


def test_a_lora_needs_a_rank_and_a_finite_alpha():
    with pytest.raises(ContractError, match="rank of at least 1"):
        replace(LORA, lora_rank=0)
    with pytest.raises(ContractError, match="lora_alpha must be a finite number"):
        replace(LORA, lora_alpha=float("nan"))


def test_a_long_wrong_value_is_cut():
    with pytest.raises(ContractError) as caught:
        Contract.from_json(changed(name=["x" * 500]))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("contract", [STUDENT, TEACHER, LORA])
def test_what_the_checkpoint_wants_passes_without_a_word(contract):
    assert contract.check(None, None, None, None) == []
    assert contract.check(contract.steps, contract.guidance, 64, 64) == []


@pytest.mark.parametrize("steps", [-1, 0, 1, 3, 4, 32])
def test_a_student_refuses_another_number_of_steps(steps):
    with pytest.raises(
        ContractError, match=f"nano-2step draws in exactly 2 steps; asked for {steps}.*student"
    ):
        STUDENT.check(steps, None, None, None)
    assert issubclass(ContractError, TwostepError)


def test_a_single_step_is_counted_in_the_singular():
    with pytest.raises(ContractError, match="exactly 1 step; asked for 2"):
        replace(STUDENT, steps=1).check(2, None, None, None)


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_switching_guidance_off_suits_a_student(guidance):
    assert STUDENT.check(None, guidance, None, None) == []


def test_a_student_says_why_guidance_has_no_effect():
    (warning,) = STUDENT.check(2, 7.5, 64, 64)
    assert "7.5 has no effect" in warning and "distilled" in warning and "teacher" in warning


@pytest.mark.parametrize("guidance", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("contract", [STUDENT, TEACHER])
def test_impossible_guidance_is_refused(contract, guidance):
    with pytest.raises(ContractError, match=f"at least 0; asked for {guidance}"):
        contract.check(None, guidance, None, None)


def test_a_teacher_takes_any_number_of_steps_but_warns_of_few():
    assert TEACHER.check(16, None, None, None) == [] == TEACHER.check(1000, None, None, None)
    (warning,) = TEACHER.check(4, None, None, None)
    assert "about 32 steps" in warning and "with 4" in warning and "students" in warning


@pytest.mark.parametrize("steps", [0, -4, 1001])
def test_a_teacher_refuses_impossible_steps(steps):
    with pytest.raises(ContractError, match=f"1 to 1000 steps, 32 by default; asked for {steps}"):
        TEACHER.check(steps, None, None, None)


def test_a_teacher_warns_that_guidance_is_off_unless_it_was_made_so():
    (warning,) = TEACHER.check(None, 1.0, None, None)
    assert "switches guidance off" in warning and "made for 4" in warning
    assert replace(TEACHER, guidance=1.0).check(None, 1.0, None, None) == []


def test_two_warnings_come_together():
    assert len(TEACHER.check(2, 0.0, 64, 64)) == 2


def test_one_side_of_a_size_is_enough_where_it_fits():
    assert STUDENT.check(None, None, 96, None) == [] == STUDENT.check(None, None, None, 64)


def test_a_size_between_the_trained_ones_is_drawn_with_a_warning():
    assert STUDENT.check(None, None, 96, 64) == []
    for width, height in ((64, 96), (32, 32), (96, 32)):
        (warning,) = STUDENT.check(None, None, width, height)
        assert f"{width}x{height} is none of these" in warning and "64x64, 96x64" in warning


@pytest.mark.parametrize(
    ("width", "height", "asked"),
    [
        (128, 128, "128x128"),
        (64, 80, "64x80"),
        (65, None, "65xany"),
        (None, 96, "anyx96"),
        (0, 64, "0x64"),
    ],
)
def test_an_unsupported_size_lists_those_there_are(width, height, asked):
    with pytest.raises(ContractError, match=f"draws 64x64, 96x64.*asked for {asked}"):
        STUDENT.check(None, None, width, height)
