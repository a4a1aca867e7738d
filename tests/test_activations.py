"""Activation quantization: its closed forms, and that it comes on and off a real denoiser without leftovers."""

import copy

import pytest
import torch
from diffusers import HunyuanDiT2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn

from quantdm.activations import (
    KEEP_8BIT,
    activation_spec,
    default_keep_8bit,
    fake_quantize,
    layer_bits,
    set_activation_bits_,
)
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.modules import quantize_module_
from quantdm.quantizers import quantize_weight
from quantdm.recipe import ActivationSpec
from quantdm.schemes import Scheme


def make_transformer() -> nn.Module:
    """Build a tiny PixArt."""
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=False,
    ).eval()


def make_unet() -> nn.Module:
    """Build a tiny Stable Diffusion U-Net."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


MODELS = {"pixart": make_transformer, "unet": make_unet}


@torch.no_grad()
def run(model: nn.Module) -> torch.Tensor:
    """Call a denoiser on fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    width = 12 if isinstance(model, PixArtTransformer2DModel) else 16
    text = torch.randn(2, 5, width, generator=generator)
    extra = {"added_cond_kwargs": {}} if isinstance(model, PixArtTransformer2DModel) else {}
    return model(x, encoder_hidden_states=text, timestep=torch.tensor([10, 500]), return_dict=False, **extra)[0]


def hooks(model: nn.Module) -> int:
    """Count the forward hooks of all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("dims", [-1, (2, 3)], ids=["token", "map"])
def test_every_range_has_at_most_2_to_the_bits_values_within_half_a_step(
    bits: int, dims: int | tuple[int, int]
) -> None:
    x = torch.randn(2, 3, 20, 300, generator=torch.Generator().manual_seed(0)) + 1
    y = fake_quantize(x, bits, dims)
    step = (x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True)) / (2**bits - 1)
    assert ((y - x).abs() <= 0.5001 * step + 1e-6).all()
    grid = torch.round(y / step)
    assert (y - grid * step).abs().max() < 1e-4  # an integer zero point: every value is a multiple of the step
    assert (grid.amax(dims) - grid.amin(dims)).max() <= 2**bits - 1


def test_tokens_and_maps_are_quantized_independently() -> None:
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    loud = x.clone()
    loud[0] *= 1000
    assert torch.equal(fake_quantize(x, 6)[1:], fake_quantize(loud, 6)[1:])
    maps = x.view(1, 5, 5, 8)
    assert torch.equal(fake_quantize(maps, 6, (2, 3))[:, 1:], fake_quantize(loud.view(1, 5, 5, 8), 6, (2, 3))[:, 1:])


def test_values_on_the_grid_zeros_and_constants_stay_exact() -> None:
    grid = torch.arange(-20.0, 44.0)[None] / 4
    assert torch.equal(fake_quantize(grid, 6), grid)
    # Ends that round apart (half to even) would need 65 levels: the upper one is clipped.
    assert fake_quantize(torch.tensor([[-1.5, 61.5]]), 6).tolist() == [[-2.0, 61.0]]
    assert torch.equal(fake_quantize(torch.zeros(2, 5), 6), torch.zeros(2, 5))
    torch.testing.assert_close(fake_quantize(torch.full((2, 5), -7.3), 6), torch.full((2, 5), -7.3))
    relu = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).relu()
    assert (fake_quantize(relu, 6)[relu == 0] == 0).all()


def test_more_bits_are_closer_and_powers_of_two_scale_along() -> None:
    x = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    error = {bits: (fake_quantize(x, bits) - x).square().mean() for bits in (6, 8)}
    assert error[8] * 8 < error[6]
    assert torch.equal(fake_quantize(4 * x, 6), 4 * fake_quantize(x, 6))


def test_bf16_is_the_fp32_result_rounded_once_and_the_gradient_passes_straight_through() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(fake_quantize(x, 8), fake_quantize(x.float(), 8).bfloat16())
    y = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantized = fake_quantize(y, 6)
    assert torch.equal(quantized, fake_quantize(y.detach(), 6))
    quantized.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_bits_order_the_error_and_switching_off_leaves_nothing_behind(make) -> None:
    model = make()
    exact, attributes = run(model), set(model.__dict__)
    error = {}
    for bits in (6, 8):
        set_activation_bits_(model, ActivationSpec(bits=bits))
        count = hooks(model)
        set_activation_bits_(model, ActivationSpec(bits=bits))
        assert hooks(model) == count  # replaced, not stacked
        error[bits] = (run(model) - exact).square().mean().item()
    keep = default_keep_8bit(model)
    assert keep
    set_activation_bits_(model, ActivationSpec(bits=6, keep_8bit=keep))
    assert activation_spec(model) == ActivationSpec(bits=6, keep_8bit=keep)
    kept = (run(model) - exact).square().mean().item()
    assert 0 < error[8] < kept < error[6]
    set_activation_bits_(model, None)
    assert torch.equal(run(model), exact)
    assert hooks(model) == 0
    assert set(model.__dict__) == attributes
    assert activation_spec(model) is None


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_every_layer_sees_a_quantized_input_and_q_k_v_leave_quantized(make) -> None:
    model = make()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    set_activation_bits_(model, ActivationSpec(bits=6))
    for record in list_layers(model):  # registered later, so these see what the layer sees and returns in the end
        layer = model.get_submodule(record.name)
        layer.register_forward_hook(lambda _, args, out, name=record.name: seen.update({name: (args[0], out)}))
    run(model)
    for record in list_layers(model):
        x, y = seen[record.name]
        rows = x.flatten(0, -2) if record.kind == "linear" else x.flatten(0, 1).flatten(1)
        assert all(len(row.unique()) <= 64 for row in rows), record.name
        if record.op_type.endswith(("to_q", "to_k", "to_v")):
            width = y.shape[-1]
            wide = all(len(row.unique()) <= 64 for row in y.reshape(-1, width))
            assert wide
            assert torch.allclose(fake_quantize(y, 6), y, atol=1e-5)


def test_globs_match_operation_types_and_names_and_must_match_something() -> None:
    model = make_transformer()
    spec = ActivationSpec(bits=6, keep_8bit=("ff.net.2", "transformer_blocks.1.attn1.to_q"))
    bits = layer_bits(model, spec)
    assert {name for name, b in bits.items() if b == 8} == {
        "transformer_blocks.0.ff.net.2",
        "transformer_blocks.1.ff.net.2",
        "transformer_blocks.1.attn1.to_q",
    }
    assert set(bits) == {record.name for record in list_layers(model)}
    set_activation_bits_(model, spec)
    with pytest.raises(QuantDMError, match=r"'ff\.net\.9' matches no layer.*ff\.net\.2"):
        set_activation_bits_(model, ActivationSpec(bits=6, keep_8bit=("ff.net.9",)))
    assert activation_spec(model) == spec  # nothing changed
    assert set(default_keep_8bit(model)) < set(KEEP_8BIT)
    kept = layer_bits(model, ActivationSpec(bits=6, keep_8bit=default_keep_8bit(model)))
    for name in ("pos_embed.proj", "adaln_single.linear", "proj_out", "transformer_blocks.0.ff.net.2"):
        assert kept[name] == 8
    for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_out.0"):
        assert kept[name] == 6


def test_default_globs_keep_the_ends_and_the_time_embedding_of_a_unet() -> None:
    model = make_unet()
    kept = layer_bits(model, ActivationSpec(bits=6, keep_8bit=default_keep_8bit(model)))
    for name in (
        "conv_in",
        "conv_out",
        "time_embedding.linear_1",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    ):
        assert kept[name] == 8
    assert kept["mid_block.resnets.0.conv1"] == 6


def test_the_halves_of_a_concatenated_long_skip_have_their_own_ranges() -> None:
    torch.manual_seed(0)
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
    ).eval()
    record = next(record for record in list_layers(model) if record.split is not None)
    set_activation_bits_(model, ActivationSpec(bits=6))
    layer = model.get_submodule(record.name)
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    x = torch.randn(1, 3, layer.in_features)
    x[..., record.split :] *= 1000  # with one range the first half would be rounded to zero
    layer(x)
    error = (seen[0] - x)[..., : record.split].abs().max()
    assert error < 0.1


def test_quantized_weights_and_activations_combine_and_a_copy_is_independent() -> None:
    model = make_transformer()
    for record in list_layers(model):
        layer = model.get_submodule(record.name)
        quantize_module_(model, record.name, quantize_weight(layer.weight, Scheme.parse("uniform-channel-4")))
    exact = run(model)
    set_activation_bits_(model, ActivationSpec(bits=8))
    changed = run(model)
    assert not torch.equal(changed, exact)
    other = copy.deepcopy(model)
    set_activation_bits_(other, None)
    assert torch.equal(run(other), exact)
    assert torch.equal(run(model), changed)


def test_a_layer_called_with_keywords_only_is_an_error_not_an_omission() -> None:
    model = make_transformer()
    set_activation_bits_(model, ActivationSpec(bits=8))
    with pytest.raises(QuantDMError, match=r"proj_out: was called with keywords"):
        model.proj_out(input=torch.zeros(1, 16))
