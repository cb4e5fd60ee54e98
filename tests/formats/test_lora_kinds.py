"""What adapters do to a weight, against formulas written out another way, and against PEFT.

Every kind does the same merged, beside its layer, and after a round through its file.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from twostep.formats.header import read_header
from twostep.formats.identify import summary
from twostep.formats.lora_files import (
    LoraError,
    find_parameter,
    merge_lora,
    read_lora,
    write_lora,
)
from twostep.formats.lora_kinds import Decomposed, LowRank
from twostep.models.bundle import Bundle
from twostep.models.loading import load_bundle, load_with_loras
from twostep.models.lora_stack import LoraCache

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.1.resnets.0.conv1"
NORM = "down_blocks.1.resnets.0.norm1"
LINEAR_KEY = "lora_unet_" + LINEAR.replace(".", "_")
CONV_KEY = "lora_unet_" + CONV.replace(".", "_")
NORM_KEY = "lora_unet_" + NORM.replace(".", "_")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle("nano")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 2


def weight_of(bundle: Bundle, layer: str) -> Tensor:
    return bundle.parts["unet"].get_submodule(layer).weight


def cases(bundle: Bundle) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Return by kind the tensors of a file, and the weights that come of them by their layers.

    Sums are written out index by index, as far as that is short.
    """
    linear, conv, norm = (weight_of(bundle, layer) for layer in (LINEAR, CONV, NORM))
    out, wide = linear.shape
    rows, columns, height, width = conv.shape
    made = {}

    down, up, core = (
        random(3, columns, 1, 1, seed=1),
        random(rows, 3, 1, 1, seed=2),
        random(3, 3, height, width, seed=3),
    )
    change = sum(
        up[:, a, 0, 0][:, None, None, None]
        * down[b, :, 0, 0][None, :, None, None]
        * core[a, b][None, None]
        for a in range(3)
        for b in range(3)
    )
    made["a LoRA in Tucker's form"] = (
        {
            f"{CONV_KEY}.lora_down.weight": down,
            f"{CONV_KEY}.lora_up.weight": up,
            f"{CONV_KEY}.lora_mid.weight": core,
            f"{CONV_KEY}.alpha": torch.tensor(1.5),
        },
        {CONV: conv + 0.5 * change},
    )

    w1a, w1b, w2a, w2b = (
        random(*shape, seed=10 + index)
        for index, shape in enumerate(((out, 2), (2, wide), (out, 2), (2, wide)))
    )
    made["a LoHa"] = (
        {
            f"{LINEAR_KEY}.hada_w1_a": w1a,
            f"{LINEAR_KEY}.hada_w1_b": w1b,
            f"{LINEAR_KEY}.hada_w2_a": w2a,
            f"{LINEAR_KEY}.hada_w2_b": w2b,
            f"{LINEAR_KEY}.alpha": torch.tensor(3.0),
        },
        {LINEAR: linear + 1.5 * torch.einsum("or,ri,os,si->oi", w1a, w1b, w2a, w2b)},
    )

    t1, t2 = (random(2, 2, height, width, seed=seed) for seed in (20, 21))
    a1, a2 = (random(2, rows, seed=seed) for seed in (22, 23))
    b1, b2 = (random(2, columns, seed=seed) for seed in (24, 25))
    first, second = (
        torch.einsum("pqhw,po,qi->oihw", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2))
    )
    made["a LoHa in Tucker's form"] = (
        {
            f"{CONV_KEY}.hada_t1": t1,
            f"{CONV_KEY}.hada_w1_a": a1,
            f"{CONV_KEY}.hada_w1_b": b1,
            f"{CONV_KEY}.hada_t2": t2,
            f"{CONV_KEY}.hada_w2_a": a2,
            f"{CONV_KEY}.hada_w2_b": b2,
            f"{CONV_KEY}.alpha": torch.tensor(1.0),
        },
        {CONV: conv + 0.5 * first * second},
    )

    w1 = random(2, 4, seed=30)
    w2a, w2b = random(out // 2, 3, seed=31), random(3, wide // 4, seed=32)
    blocks = torch.cat(
        [torch.cat([w1[i, j] * (w2a @ w2b) for j in range(4)], dim=1) for i in range(2)]
    )
    made["a LoKr"] = (
        {
            f"{LINEAR_KEY}.lokr_w1": w1,
            f"{LINEAR_KEY}.lokr_w2_a": w2a,
            f"{LINEAR_KEY}.lokr_w2_b": w2b,
            f"{LINEAR_KEY}.alpha": torch.tensor(6.0),
        },
        {LINEAR: linear + 2 * blocks},
    )

    w1, w2 = random(2, 2, seed=33), random(rows // 2, columns // 2, height, width, seed=34)
    blocks = torch.cat(
        [torch.cat([w1[i, j] * w2 for j in range(2)], dim=1) for i in range(2)], dim=0
    )
    made["a LoKr stored whole, whose alpha counts nothing"] = (
        {
            f"{CONV_KEY}.lokr_w1": w1,
            f"{CONV_KEY}.lokr_w2": w2,
            f"{CONV_KEY}.alpha": torch.tensor(77.0),
        },
        {CONV: conv + blocks},
    )

    down, up = random(2, wide, seed=40), random(out, 2, seed=41)
    lengths = 1 + random(out, 1, seed=42)
    changed = linear + 0.5 * up @ down
    made["a DoRA of rows"] = (
        {
            f"{LINEAR_KEY}.lora_down.weight": down,
            f"{LINEAR_KEY}.lora_up.weight": up,
            f"{LINEAR_KEY}.alpha": torch.tensor(1.0),
            f"{LINEAR_KEY}.dora_scale": lengths,
        },
        {LINEAR: lengths * changed / changed.square().sum(1, keepdim=True).sqrt()},
    )

    down, up = random(2, columns, height, width, seed=43), random(rows, 2, 1, 1, seed=44)
    lengths = 1 + random(1, columns, 1, 1, seed=45)
    changed = conv + torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    if rows != columns:
        made["a DoRA of columns"] = (
            {
                f"{CONV_KEY}.lora_down.weight": down,
                f"{CONV_KEY}.lora_up.weight": up,
                f"{CONV_KEY}.alpha": torch.tensor(2.0),
                f"{CONV_KEY}.dora_scale": lengths,
            },
            {CONV: lengths * changed / changed.square().sum((0, 2, 3), keepdim=True).sqrt()},
        )

    full = random(out, wide, seed=50)
    scale, shift = random(*norm.shape, seed=51), random(*norm.shape, seed=52)
    made["full differences and norms"] = (
        {
            f"{LINEAR_KEY}.diff": full,
            f"{NORM_KEY}.w_norm": scale,
            f"{NORM_KEY}.b_norm": shift,
        },
        {
            LINEAR: linear + full,
            NORM: norm + scale,
            f"{NORM}.bias": bundle.parts["unet"].get_submodule(NORM).bias + shift,
        },
    )
    return made


NAMES = (
    "a LoRA in Tucker's form",
    "a LoHa",
    "a LoHa in Tucker's form",
    "a LoKr",
    "a LoKr stored whole, whose alpha counts nothing",
    "a DoRA of rows",
    "a DoRA of columns",
    "full differences and norms",
)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("strength", [1.0, pytest.param(-0.5, marks=pytest.mark.slow)])
def test_every_kind_does_the_same_merged_beside_and_written_again(
    kind: str, strength: float, bundle: Bundle, tmp_path: Path
) -> None:
    tensors, expected = cases(bundle)[kind]
    path = tmp_path / "adapter.safetensors"
    save_file(tensors, path)
    again = tmp_path / "again.safetensors"
    save_file(write_lora(read_lora(path, bundle.parts), bundle.parts, "kohya")[0], again)
    for file in (path, again):
        merged = load_with_loras("nano", [f"{file}:{strength}"])
        for layer, full in expected.items():
            old = find_parameter(bundle.parts, f"unet.{layer}")
            wanted = old + strength * (full - old)
            got = find_parameter(merged.parts, f"unet.{layer}")
            torch.testing.assert_close(got.data, wanted.data, atol=1e-5, rtol=1e-5)
    beside = LoraCache(bundle).apply([f"{path}:{strength}"])
    torch.testing.assert_close(answer(beside), answer(merged), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(answer(beside), answer(bundle), atol=1e-4)


def answer(bundle: Bundle) -> Tensor:
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = bundle.conditioning(["a red fox"], 64, 64)
    with torch.no_grad():
        return bundle.denoiser(x, torch.tensor([1000]), conditioning).eps


@pytest.mark.parametrize("order", ["LoRA first", "DoRA first"])
def test_on_one_layer_the_order_counts_and_both_ways_keep_it(
    order: str, bundle: Bundle, tmp_path: Path
) -> None:
    made = cases(bundle)
    save_file(made["a DoRA of rows"][0], tmp_path / "dora.safetensors")
    plain = {k: v for k, v in made["a DoRA of rows"][0].items() if "dora" not in k}
    save_file({k: v * 1.5 for k, v in plain.items()}, tmp_path / "lora.safetensors")
    stack = [str(tmp_path / "lora.safetensors"), f"{tmp_path / 'dora.safetensors'}:0.7"]
    stack = stack if order == "LoRA first" else stack[::-1]
    merged, beside = load_with_loras("nano", stack), LoraCache(bundle).apply(stack)
    weights = [find_parameter(each.parts, f"unet.{LINEAR}").data for each in (merged, beside)]
    torch.testing.assert_close(*weights)
    other = load_with_loras("nano", stack[::-1])
    assert (find_parameter(other.parts, f"unet.{LINEAR}") - weights[0]).abs().max() > 1e-3


def unet_of(bundle: Bundle) -> UNet2DConditionModel:
    copied = UNet2DConditionModel.from_config(bundle.parts["unet"].config)
    copied.load_state_dict(bundle.parts["unet"].state_dict())
    return copied


CONFIGS: dict[str, Any] = {
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        rank_pattern={"attn2.to_k": 2},
        alpha_pattern={"to_k": 16, "attn2.to_q": 1, r"down_blocks\.\d+\..*attn1\.to_q": 3},
        target_modules=["to_q", "to_k", "conv1"],
        init_lora_weights=False,
    ),
    "rank-stabilised": LoraConfig(
        r=3, lora_alpha=8, use_rslora=True, target_modules=["to_q"], init_lora_weights=False
    ),
    "DoRA": LoraConfig(
        r=4,
        lora_alpha=2,
        use_dora=True,
        target_modules=["to_q", "conv1"],
        init_lora_weights=False,
    ),
    "bias": LoraConfig(
        r=4, lora_alpha=2, lora_bias=True, target_modules=["conv1"], init_lora_weights=False
    ),
    "LoHa": LoHaConfig(r=3, alpha=2, target_modules=["to_q", "conv1"], init_weights=False),
    "LoKr": LoKrConfig(
        r=2,
        alpha=3,
        target_modules=["to_q", "conv1"],
        alpha_pattern={"conv1": 5},
        decompose_both=True,
        init_weights=False,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_is_what_peft_merges(name: str, bundle: Bundle, tmp_path: Path) -> None:
    config = CONFIGS[name]
    torch.manual_seed(0)
    theirs = inject_adapter_in_model(config, unet_of(bundle))
    for key, parameter in theirs.named_parameters():
        if "lora_B" in key and key.endswith("bias"):
            nn.init.normal_(parameter)
    state = {
        f"base_model.model.{key}": value.contiguous()
        for key, value in get_peft_model_state_dict_of(theirs, config).items()
    }
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    ours = load_with_loras("nano", [str(tmp_path)])
    expected = merged_by_peft(theirs)
    assert len(expected) > 2
    for layer, (weight, bias) in expected.items():
        module = ours.parts["unet"].get_submodule(layer)
        torch.testing.assert_close(module.weight.data, weight, atol=1e-5, rtol=1e-4)
        if bias is not None:
            torch.testing.assert_close(module.bias.data, bias, atol=1e-5, rtol=1e-4)


def get_peft_model_state_dict_of(network: nn.Module, config: Any) -> dict[str, Tensor]:
    network.peft_config = {"default": config}
    return get_peft_model_state_dict(network)


def merged_by_peft(network: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the weights and biases of all adapted layers after PEFT merged them."""
    merged = {}
    for name, module in network.named_modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()
            base = module.get_base_layer()
            merged[name] = (base.weight.data, None if base.bias is None else base.bias.data)
    return merged


ODD: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "an alpha of two numbers": (
        {f"{LINEAR_KEY}.alpha": torch.ones(2)},
        {},
        r"alpha of unet.* has the shape \[2\]",
    ),
    "no number": ({f"{LINEAR_KEY}.alpha": torch.tensor(math.nan)}, {}, "is nan; expected a finite"),
    "metadata that are a list": ({}, {"lora_adapter_metadata": "[1]"}, "no JSON object"),
    "metadata that are null": ({}, {"lora_adapter_metadata": "null"}, "no JSON object"),
    "an alpha in words": (
        {},
        {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": "eight"})},
        "lora_alpha is 'eight', no number",
    ),
    "patterns that are a list": (
        {},
        {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": [8]})},
        "no mapping",
    ),
    "no pattern": (
        {},
        {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"(": 8}})},
        "no pattern",
    ),
    "a rank of 0": (
        {},
        {"lora_adapter_metadata": json.dumps({"unet.r": 0})},
        "a rank is 1 or more",
    ),
    "another rank": (
        {},
        {"lora_adapter_metadata": json.dumps({"unet.r": 16, "unet.lora_alpha": 16})},
        "has the rank 2, and .* says 16",
    ),
    "a base of its own": (
        {},
        {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "pissa"})},
        "fits no other",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_alphas_and_metadata_are_refused_in_a_line(
    name: str, bundle: Bundle, tmp_path: Path
) -> None:
    out, wide = weight_of(bundle, LINEAR).shape
    changed, metadata, message = ODD[name]
    good = {
        f"{LINEAR_KEY}.lora_down.weight": torch.ones(2, wide),
        f"{LINEAR_KEY}.lora_up.weight": torch.ones(out, 2),
    }
    save_file(good | changed, tmp_path / "odd.safetensors", metadata)
    with pytest.raises(LoraError, match=message) as error:
        read_lora(tmp_path / "odd.safetensors", bundle.parts)
    assert "\n" not in str(error.value)


def test_a_rank_of_nothing_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    out, wide = weight_of(bundle, LINEAR).shape
    tensors = {
        f"{LINEAR_KEY}.lora_down.weight": torch.ones(0, wide),
        f"{LINEAR_KEY}.lora_up.weight": torch.ones(out, 0),
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(LoraError, match="expected a rank of 1 or more"):
        read_lora(tmp_path / "odd.safetensors", bundle.parts)


@pytest.mark.parametrize(
    ("ending", "what"),
    [
        ("oft_blocks", "an OFT, which is not read here"),
        ("on_input", "an IA3, which is not read here"),
        ("hada_w1_a", "a LoHa"),
        ("lokr_w1", "a LoKr"),
        ("diff", "a full difference"),
        ("dora_scale", "a DoRA"),
        ("never_heard_of", "an adapter of a kind that is not read here"),
    ],
)
def test_inspect_says_what_the_reader_does(
    ending: str, what: str, bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    save_file({f"{LINEAR_KEY}.{ending}": torch.ones(2)}, path)
    described = summary(read_header(path))
    assert described["is"] == what
    is_read = not what.endswith("not read here")
    assert described["read by"].startswith("twostep") == is_read
    with pytest.raises(LoraError):
        read_lora(path, bundle.parts)


def test_half_a_lora_is_no_lora_to_inspect(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_file({f"{LINEAR_KEY}.lora_down.weight": torch.ones(2, 4)}, path)
    described = summary(read_header(path))
    assert (
        described["is"]
        == "a LoRA for SDXL's classes, in another size, with 1 lower and 0 upper halves"
    )
    assert described["read by"].startswith("not twostep")


def test_only_a_lora_goes_into_peft_s_names(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "loha.safetensors"
    save_file(cases(bundle)["a LoHa"][0], path)
    changes = read_lora(path, bundle.parts)
    for dialect in ("peft", "early"):
        with pytest.raises(LoraError, match=r"has a LoHa\. Use kohya"):
            write_lora(changes, bundle.parts, dialect)


def test_a_dora_goes_through_peft_s_names_and_back(bundle: Bundle, tmp_path: Path) -> None:
    first, second = tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"
    save_file(cases(bundle)["a DoRA of rows"][0], first)
    changes = read_lora(first, bundle.parts)
    tensors, metadata = write_lora(changes, bundle.parts, "peft")
    save_file(tensors, second, metadata)
    (again,) = read_lora(second, bundle.parts).values()
    (before,) = changes.values()
    assert isinstance(again, Decomposed) and isinstance(before, Decomposed)
    assert isinstance(again.inner, LowRank) and isinstance(before.inner, LowRank)
    assert torch.equal(again.inner.down, before.inner.down)
    assert torch.equal(again.magnitude.flatten(), before.magnitude.flatten())
    assert again.inner.alpha == before.inner.alpha


def test_at_strength_0_nothing_changes(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "dora.safetensors"
    save_file(cases(bundle)["a DoRA of rows"][0], path)
    ours = load_bundle("nano")
    merge_lora(read_lora(path, ours.parts), ours.parts, weight=0.0)
    torch.testing.assert_close(weight_of(ours, LINEAR), weight_of(bundle, LINEAR))
