"""The motion module against diffusers' own, its shapes, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file

from twostep.diffusion import VariancePreserving
from twostep.formats.lora_files import merge_lora, read_lora, write_lora
from twostep.formats.motion_files import (
    MotionConfig,
    MotionError,
    frame_positions,
    our_names,
    to_animatediff,
    to_diffusers,
)
from twostep.networks.adapters import add_lora
from twostep.networks.backbone import HasFeatures, HasFrozen, modules_of
from twostep.networks.conditioning import Conditioning
from twostep.networks.denoiser import Denoiser
from twostep.networks.domain_adapter import DomainAdapter
from twostep.networks.lean import LeanUnet
from twostep.networks.motion import LORA_TARGETS, MotionModule, MotionUnet, check_fit
from twostep.pretrain.model import build_unet
from twostep.pretrain.sizes import NANO

FRAMES = 6
CONFIG = MotionConfig(channels=(48, 96, 160), layers=1, groups=16, max_frames=24)


def lively(config=CONFIG, seed=0):
    """Return a motion module whose last layers do something."""
    torch.manual_seed(seed)
    module = MotionModule(config)
    for name, parameter in module.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures():
    """Return nano's UNet with random weights, of diffusers and ours."""
    torch.manual_seed(1)
    theirs = build_unet(NANO).eval().requires_grad_(False)
    ours = LeanUnet(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval().requires_grad_(False)


def wishes(count, seed=2, **others):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, FRAMES, 16, 16, generator=generator)
    text = torch.randn(count, 20, 160, generator=generator)
    pooled = torch.randn(count, 96, generator=generator)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(count, -1)
    times = torch.tensor([700, 320, 41][:count])
    return x, times, Conditioning(text, pooled, sizes, **others)


def added_of(conditioning):
    return {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}


def in_diffusers(theirs, module, tmp_path):
    """Return diffusers' UNet for clips, with our file of a motion module."""
    save_file(to_diffusers(module.state_dict(), CONFIG), tmp_path / "mm.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_diffusers()))
    (tmp_path / "mm.safetensors").rename(tmp_path / "diffusion_pytorch_model.safetensors")
    adapter, report = MotionAdapter.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    unet = UNetMotionModel.from_unet2d(theirs, adapter, load_weights=True).eval()
    # diffusers 0.42 leaves these two layers of SDXL's as they are initialised.
    unet.add_embedding.load_state_dict(theirs.add_embedding.state_dict())
    return unet


def drawn_by_diffusers(unet, x, times, conditioning):
    text = conditioning.text.repeat_interleave(FRAMES, dim=0)
    return unet(x, times, text, added_cond_kwargs=added_of(conditioning)).sample


def test_output_is_that_of_diffusers_with_our_file(pictures, tmp_path) -> None:
    theirs, ours = pictures
    module = lively()
    unet = in_diffusers(theirs, module, tmp_path)
    x, times, conditioning = wishes(2)
    with torch.no_grad():
        expected = drawn_by_diffusers(unet, x, times, conditioning)
        drawn = MotionUnet(module, (ours,))(x, times, conditioning)
        still = MotionUnet(MotionModule(CONFIG), (ours,))(x, times, conditioning)
    assert torch.allclose(drawn, expected, atol=1e-5, rtol=0)
    assert (drawn - still).abs().max() > 0.01


def test_diffusers_reads_the_domain_adapter(pictures, tmp_path) -> None:
    """By what `load_lora_weights` of its pipelines calls."""
    theirs, ours = pictures
    module = lively()
    unet = in_diffusers(theirs, module, tmp_path)
    adapter = DomainAdapter.on(ours, 4)
    for up in adapter.up:
        torch.nn.init.normal_(up, std=0.2)
    tensors, _ = write_lora(adapter.changes(), {"unet": ours}, "peft")
    unet.load_lora_adapter(tensors, prefix="unet")
    x, times, conditioning = wishes(1)
    with torch.no_grad():
        expected = drawn_by_diffusers(unet, x, times, conditioning)
        without = MotionUnet(module, (ours,))(x, times, conditioning)
        with adapter.applied(ours):
            drawn = MotionUnet(module, (ours,))(x, times, conditioning)
    assert torch.allclose(drawn, expected, atol=1e-5, rtol=0)
    assert (drawn - without).abs().max() > 0.01


def with_lora(module, name="fast"):
    """Put a LoRA that does something on a motion module."""
    lora = add_lora(module, name, rank=3, targets=LORA_TARGETS)
    generator = torch.Generator().manual_seed(4)
    for parameter in lora.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return lora


def test_diffusers_draws_with_our_lora_on_the_module(pictures, tmp_path) -> None:
    theirs, ours = pictures
    module = lively()
    unet = in_diffusers(theirs, module, tmp_path)
    lora = with_lora(module)
    unet.load_lora_adapter(
        {f"unet.{name}": value.clone() for name, value in lora.state_dict().items()}, prefix="unet"
    )
    x, times, conditioning = wishes(1)
    denoiser = Denoiser(MotionUnet(module, (ours,)), VariancePreserving.scaled_linear(), "eps")
    with torch.no_grad():
        expected = drawn_by_diffusers(unet, x, times - 1, conditioning)
        drawn = replace(denoiser, lora="fast")(x, times, conditioning).eps
        merged = replace(denoiser, lora="fast").standalone()(x, times, conditioning).eps
        without = denoiser(x, times, conditioning).eps
        plain = denoiser.standalone()(x, times, conditioning).eps
    assert torch.allclose(drawn, expected, atol=2e-5, rtol=0)
    assert torch.allclose(merged, drawn, atol=2e-5, rtol=0)
    assert torch.equal(plain, without)
    assert (drawn - without).abs().max() > 0.01


def test_animatediffs_own_motion_loras_are_read(tmp_path) -> None:
    """By the names that the files of its authors have."""
    module = lively()
    layer = "up_blocks.1.motion_modules.0.temporal_transformer.transformer_blocks.0"
    down, up = torch.randn(4, 96), torch.randn(96, 4)
    tensors = {}
    for part in ("to_q", "to_out"):
        name = f"{layer}.attention_blocks.1.processor.{part}_lora"
        tensors |= {f"{name}.down.weight": down.clone(), f"{name}.up.weight": up.clone()}
    save_file(tensors, tmp_path / "v2_lora_ZoomIn.safetensors")
    parts = {"unet": module}
    changes = read_lora(tmp_path / "v2_lora_ZoomIn.safetensors", parts)
    ours = "unet.up_blocks.1.motion_modules.0.transformer_blocks.0.attn2"
    assert set(changes) == {f"{ours}.to_q", f"{ours}.to_out.0"}
    before = module.state_dict()[f"{ours}.to_q.weight".removeprefix("unet.")].clone()
    merge_lora(changes, parts)
    after = module.state_dict()[f"{ours}.to_q.weight".removeprefix("unet.")]
    assert torch.allclose(after - before, up @ down, atol=1e-5)


def test_recomputing_is_done_with_the_lora_of_then(pictures) -> None:
    """Another one may be at work when the backward pass comes."""
    _, ours = pictures
    module = lively()
    lora = with_lora(module)
    denoiser = Denoiser(MotionUnet(module, (ours,)), VariancePreserving.scaled_linear(), "eps")
    student = replace(denoiser, lora="fast")
    x, times, conditioning = wishes(1)
    lora.requires_grad_(True)

    def gradients(recompute):
        denoiser.checkpoint_gradients(recompute)
        loss = student(x, times, conditioning).eps.square().mean()
        with torch.no_grad():
            denoiser(x, times, conditioning)  # leaves none at work
        return torch.autograd.grad(loss, list(lora.parameters()))

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert one.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-9)


def test_fresh_module_draws_every_frame_as_the_picture_model(pictures) -> None:
    _, ours = pictures
    x, times, conditioning = wishes(1)
    with torch.no_grad():
        clip = MotionUnet(MotionModule(CONFIG), (ours,))(x, times, conditioning)
        added = added_of(conditioning)
        frame = ours(x[:, :, 3], times, conditioning.text, added_cond_kwargs=added)[0]
    assert torch.allclose(clip[:, :, 3], frame, atol=1e-5)


def test_items_are_drawn_on_the_picture_model_that_they_are_for(pictures) -> None:
    _, first = pictures
    torch.manual_seed(9)
    second = LeanUnet(first.config).eval().requires_grad_(False)
    module = lively()
    x, times, conditioning = wishes(3, variants=(1, 0, 1))
    both = MotionUnet(module, (first, second))
    assert isinstance(both, HasFeatures) and isinstance(both, HasFrozen)
    assert modules_of(both) == [module, first, second]
    with torch.no_grad():
        mixed = both(x, times, conditioning)
        levels = both.features(x, times, conditioning)
        for place, base in enumerate((second, first, second)):
            row = slice(place, place + 1)
            wish = conditioning[row]
            assert wish.variants == (conditioning.variants[place],)
            alone = MotionUnet(module, (base,))
            plain = Conditioning(wish.text, wish.pooled, wish.sizes)
            assert torch.allclose(mixed[row], alone(x[row], times[row], plain), atol=1e-5)
            for level, own in zip(levels, alone.features(x[row], times[row], plain), strict=True):
                assert torch.allclose(level[row], own, atol=1e-4)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (48, FRAMES, 16, 16),
        (96, FRAMES, 8, 8),
        (160, FRAMES, 4, 4),
        (160, FRAMES, 4, 4),
    ]
    with pytest.raises(MotionError, match="picture model 1, and there are 1"):
        MotionUnet(module, (first,))(x, times, conditioning)


def test_encoder_copy_is_the_encoder_and_learns_alone(pictures) -> None:
    _, ours = pictures
    backbone = MotionUnet(lively(), (ours, ours))
    encoder = backbone.encoder_copy()
    x, times, conditioning = wishes(2, variants=(0, 1))
    with torch.no_grad():
        own = backbone.features(x, times, conditioning)
        copied = encoder.features(x, times, conditioning)
        # Not to the last bit: where copied weights lie decides which kernels read them.
        torch.testing.assert_close(copied, own)
        encoder.network.variants.weight[1] += 1
        changed = encoder.features(x, times, conditioning)
    # Only the item of the second picture model is told apart.
    torch.testing.assert_close(changed[-1][0], own[-1][0])
    assert not torch.allclose(changed[-1][1], own[-1][1], rtol=1e-3, atol=1e-3)
    encoder.network.requires_grad_(True)
    encoder.checkpoint_gradients(True)
    encoder.features(x, times, conditioning)[-1].sum().backward()
    assert encoder.network.base.conv_in.weight.grad is not None
    assert ours.conv_in.weight.grad is None


def test_gradients_are_the_same_where_blocks_are_computed_again(pictures) -> None:
    _, ours = pictures
    x, times, conditioning = wishes(1)
    gradients = []
    for recompute in (False, True):
        backbone = MotionUnet(lively().requires_grad_(True), (ours,))
        backbone.checkpoint_gradients(recompute)
        backbone(x, times, conditioning).square().sum().backward()
        gradients.append([p.grad for p in backbone.network.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert torch.allclose(kept, again, rtol=1e-4, atol=1e-6)


def test_positions_are_sines_and_cosines() -> None:
    positions = frame_positions(8, 6)
    assert positions[3, 0] == pytest.approx(0.14112, abs=1e-5)  # sin 3
    assert positions[3, 1] == pytest.approx(-0.98999, abs=1e-5)  # cos 3
    assert positions[5, 4] == pytest.approx(0.010772, abs=1e-6)  # sin(5 / 10000 ** (4 / 6))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MotionConfig(), id="sd15"),
        pytest.param(MotionConfig(channels=(320, 640, 1280), has_middle=False), id="sdxl"),
    ],
)
def test_names_and_shapes_are_those_of_the_real_sizes(config) -> None:
    with torch.device("meta"):
        ours = MotionModule(config)
        theirs = MotionAdapter.from_config(config.to_diffusers())
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    own = {name: value.shape for name, value in to_diffusers(ours.state_dict(), config).items()}
    assert own == expected
    assert MotionConfig.from_diffusers(theirs.config) == config


def test_animatediffs_own_names_are_read_and_written() -> None:
    module = lively()
    written = to_animatediff(module.state_dict(), CONFIG)
    first = "down_blocks.0.motion_modules.0.temporal_transformer."
    block = f"{first}transformer_blocks.0."
    assert {
        f"{first}norm.weight",
        f"{first}proj_in.weight",
        f"{block}attention_blocks.0.to_q.weight",
        f"{block}attention_blocks.1.to_out.0.bias",
        f"{block}attention_blocks.1.pos_encoder.pe",
        f"{block}norms.1.weight",
        f"{block}ff_norm.bias",
        f"{block}ff.net.0.proj.weight",
    } <= written.keys()
    # As released, where a training with several processes left its prefix.
    read = our_names({f"module.{name}": value for name, value in written.items()})
    again = MotionModule(MotionConfig.of_weights(written, groups=16))
    again.load_state_dict(read)
    assert again.shape == CONFIG
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_diffusers_translates_animatediffs_names_alike() -> None:
    from diffusers.loaders.single_file_utils import convert_animatediff_checkpoint_to_diffusers

    module = lively()
    theirs = convert_animatediff_checkpoint_to_diffusers(
        to_animatediff(module.state_dict(), CONFIG)
    )
    own = module.state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)


def test_module_for_another_family_is_refused(pictures) -> None:
    _, ours = pictures
    with pytest.raises(MotionError, match=r"SDXL.*another family"):
        check_fit(MotionConfig(channels=(320, 640, 1280), has_middle=False), ours)


def test_clips_longer_than_the_positions_are_refused(pictures) -> None:
    _, ours = pictures
    _, times, conditioning = wishes(1)
    x = torch.zeros(1, 4, 25, 16, 16)
    with pytest.raises(MotionError, match=r"25 frames are too many: .* 1 to 24"):
        MotionUnet(lively(), (ours,))(x, times, conditioning)


def test_sd15_unets_have_a_lean_network() -> None:
    """Without pooled text and sizes, against diffusers."""
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        layers_per_block=2,
    )
    assert LeanUnet.fits(theirs.config)
    ours = LeanUnet(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 8, 8)
    text = torch.randn(2, 5, 24)
    times = torch.tensor([3, 500])
    with torch.no_grad():
        expected = theirs(x, times, text).sample
        drawn = ours(x, times, text, added_cond_kwargs={})[0]
    assert torch.allclose(drawn, expected, atol=1e-5)


def test_file_keeps_positions_that_diffusers_expects(tmp_path) -> None:
    path = tmp_path / "mm.safetensors"
    save_file(to_diffusers(lively().state_dict(), CONFIG), path)
    positions = load_file(path)["down_blocks.1.motion_modules.0.transformer_blocks.0.pos_embed.pe"]
    assert torch.equal(positions, frame_positions(24, 96)[None])
