"""What the nodes know without ComfyUI: sigmas, contracts by kind of file, families of students."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

from comfyui.sampling import explain, kind_of, read_contract, sigmas, student_beside
from twostep.contract import Contract, ContractError, VariancePreservingSpec
from twostep.diffusion import VariancePreserving
from twostep.formats.locate import ModelError

from .conftest import STUDENT, Shelf, student_of


def lora_for(steps: int, **changes: object) -> Contract:
    return student_of(steps, lora_rank=2, lora_alpha=1.0, **changes)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_sigmas_are_those_of_diffusers_trailing_times(steps: int) -> None:
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    values = sigmas(student_of(steps))
    torch.testing.assert_close(values, scheduler.sigmas.float(), atol=0, rtol=1e-4)
    assert values.dtype == torch.float32 and values[-1] == 0 and len(values) == steps + 1
    assert bool((values[1:] < values[:-1]).all())


def test_sigmas_lie_on_the_times_that_were_trained() -> None:
    schedule = VariancePreserving.scaled_linear()
    table = (schedule.sigmas[1:] / schedule.alphas[1:]).log()
    nearest = [int((table - sigma.log()).abs().argmin()) for sigma in sigmas(student_of(4))[:-1]]
    assert nearest == [999, 749, 499, 249]
    assert [index + 1 for index in nearest] == list(STUDENT.trained_times)


def test_a_file_is_known_by_its_tensors(shelf: Shelf) -> None:
    assert kind_of(shelf.checkpoint("a")) == "checkpoint"
    assert kind_of(shelf.unet("a")) == "unet"
    assert kind_of(shelf.lora("a")) == kind_of(shelf.lora("b", dialect="peft")) == "lora"
    (shelf.root / "loras" / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is no whole safetensors file"):
        kind_of(shelf.root / "loras" / "broken.safetensors")


def test_what_carries_a_contract_is_sampled_by_it(shelf: Shelf) -> None:
    for steps in (1, 4):
        contract = student_of(steps)
        assert read_contract(shelf.checkpoint(f"s{steps}", contract)) == contract
        assert read_contract(shelf.unet(f"s{steps}", contract)) == contract


def test_official_files_are_known_by_name(shelf: Shelf) -> None:
    one = read_contract(shelf.unet("sdxl_lightning_1step_unet_x0"))
    assert (one.steps, one.prediction_type, one.guidance) == (1, "x0", 1)
    base = shelf.checkpoint("sd_xl_base_1.0")
    four = read_contract(shelf.lora("sdxl_lightning_4step_lora"), base)
    assert (four.name, four.steps, four.lora_rank) == ("sd_xl_base_1.0-4step", 4, 2)


def test_a_checkpoint_that_says_nothing_is_a_teacher(shelf: Shelf) -> None:
    plain = read_contract(shelf.checkpoint("plain"))
    assert (plain.role, plain.prediction_type, plain.steps, plain.guidance) == (
        "teacher",
        "eps",
        32,
        6,
    )
    assert read_contract(shelf.checkpoint("v", v_pred=torch.zeros(0))).prediction_type == "v"
    zero = read_contract(shelf.checkpoint("z", v_pred=torch.zeros(0), ztsnr=torch.zeros(0)))
    assert zero.schedule == VariancePreservingSpec(zero_snr=True)
    assert sigmas(zero)[0] == pytest.approx(4096, rel=1e-6)
    edm = torch.zeros(1, 4, 1, 1)
    playground = read_contract(shelf.checkpoint("e", edm_mean=edm, edm_std=edm + 1))
    with pytest.raises(ContractError, match="which these nodes do not sample"):
        sigmas(playground)
    other = shelf.root / "checkpoints" / "sd15.safetensors"
    save_file(
        {"first_stage_model.x": torch.zeros(1), "cond_stage_model.transformer.x": torch.zeros(1)},
        other,
    )
    with pytest.raises(
        ModelError, match=r"sd15.safetensors is no whole SDXL checkpoint: it has no model.diffusion"
    ):
        read_contract(other)


def test_what_nobody_can_know_is_told(shelf: Shelf) -> None:
    for path in (shelf.unet("x"), shelf.lora("x")):
        with pytest.raises(
            ModelError,
            match="carries no sampling contract, and its name is none of the official ones",
        ):
            read_contract(path)


def test_a_lora_goes_where_it_belongs(shelf: Shelf) -> None:
    lora, base = shelf.lora("l", lora_for(4)), shelf.checkpoint("anime")
    contract = read_contract(lora, base)
    assert (contract.name, contract.steps, contract.guidance, contract.base) == (
        "anime-4step",
        4,
        1,
        "anime",
    )
    with pytest.raises(ContractError, match="choose the checkpoint that it goes on as the base"):
        read_contract(lora)
    with pytest.raises(ContractError, match="it would be distilled twice"):
        read_contract(lora, shelf.checkpoint("fast", student_of(2)))
    with pytest.raises(ContractError, match="distilled where eps is predicted; v predicts v"):
        read_contract(lora, shelf.checkpoint("v", v_pred=torch.zeros(0)))
    with pytest.raises(ContractError, match="is a UNet alone; a base is a whole checkpoint"):
        read_contract(lora, shelf.unet("u", student_of(2)))
    with pytest.raises(ModelError, match=r"reads only in part \(as unet.*--to lora-kohya"):
        read_contract(shelf.lora("p", lora_for(4), dialect="peft"), base)


def test_a_style_trained_on_a_student_goes_on_that_one(shelf: Shelf) -> None:
    style = shelf.lora("style", lora_for(2, base="small-2step"))
    contract = read_contract(style, shelf.checkpoint("fast", student_of(2)))
    assert (contract.name, contract.steps) == ("small-2step+style", 2)
    with pytest.raises(ContractError, match="was trained on small-2step; this is small-4step"):
        read_contract(style, shelf.checkpoint("four", student_of(4)))


def test_the_student_of_so_many_steps_is_found_beside(shelf: Shelf) -> None:
    files = {
        steps: shelf.unet(f"student-{chr(96 + steps)}", student_of(steps)) for steps in (1, 2, 4, 8)
    }
    shelf.unet("another-base", student_of(2, base="other"))
    shelf.unet("unsaid")
    for steps, path in files.items():
        assert student_beside(files[4], steps) == path
    with pytest.raises(
        ContractError, match=r"draws in 3 steps; there are students for 8, 4, 2, 1\."
    ):
        student_beside(files[4], 3)
    with pytest.raises(ContractError, match="choose one of the students"):
        student_beside(shelf.root / "diffusion_models" / "unsaid.safetensors", 2)


def test_official_files_are_a_family(shelf: Shelf) -> None:
    names = {8: "8step_unet", 4: "4step_unet", 2: "2step_unet", 1: "1step_unet_x0"}
    files = {steps: shelf.unet(f"sdxl_lightning_{name}") for steps, name in names.items()}
    for steps, path in files.items():
        assert student_beside(files[4], steps) == path
    assert read_contract(student_beside(files[4], 1)).prediction_type == "x0"


def test_two_students_of_one_kind_are_not_chosen_between(shelf: Shelf) -> None:
    four, first, second = (
        shelf.unet("four", student_of(4)),
        shelf.unet("a", student_of(2)),
        shelf.unet("b", student_of(2)),
    )
    with pytest.raises(ContractError, match=r"2 files beside .* \(a.safetensors, b.safetensors\)"):
        student_beside(four, 2)
    assert student_beside(first, 2) == first and student_beside(second, 2) == second


def test_a_damaged_neighbour_matters_only_where_a_student_is_missing(shelf: Shelf) -> None:
    four, two = shelf.unet("four", student_of(4)), shelf.unet("two", student_of(2))
    (two.parent / "half.safetensors").write_bytes(two.read_bytes()[:100])
    assert student_beside(four, 2) == two
    with pytest.raises(ContractError, match=r"draws in 8 steps.*Not readable: .*half.safetensors"):
        student_beside(four, 8)


def test_the_kinds_of_file_are_families_of_their_own(shelf: Shelf) -> None:
    (shelf.root / "all").mkdir()
    paths = [
        shelf.unet("u4", student_of(4)),
        shelf.lora("l2", lora_for(2)),
        shelf.checkpoint("c2", student_of(2)),
    ]
    unet, lora, whole = (path.rename(shelf.root / "all" / path.name) for path in paths)
    with pytest.raises(ContractError, match="there are students for 4"):
        student_beside(unet, 2)
    assert student_beside(lora, 2) == lora and student_beside(whole, 2) == whole


def test_a_file_is_explained(shelf: Shelf) -> None:
    explanation = explain(shelf.lora("l", lora_for(4)))
    assert "name: small-4step (a LoRA of rank 2 and alpha 1, student)" in explanation
    assert "sampler: euler, scheduler simple, 4 steps, cfg 1" in explanation
    assert "sigmas: 14.6146, " in explanation and explanation.count("0.0000") == 1
    assert "trained at: 1000, 750, 500, 250" in explanation and "contract: its own" in explanation
    one = explain(shelf.unet("u", student_of(1)))
    assert "predicts: x0 (node ModelSamplingDiscrete: x0)" in one
    plain = explain(shelf.checkpoint("plain"))
    assert "32 steps, cfg 6" in plain and ", ...\n" in plain and "contract: none" in plain
