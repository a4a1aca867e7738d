"""Activation quantization: its closed forms, what an integer product can factor out, on and off a real denoiser."""

import copy

import pytest
import torch
from diffusers import HunyuanDiT2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F

from quantdm.activations import (
    activation_spec,
    quantize_activations,
    sensitive_types,
    set_activation_bits_,
    usual_activations,
)
from quantdm.activations.attention import QuantizedAttention, quantize_probabilities
from quantdm.activations.sensitive import SENSITIVE
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import QuantDMError
from quantdm.modules import quantize_module_
from quantdm.quantizers import quantize_weight
from quantdm.recipe import ActivationScheme, ActivationSpec
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


def rounded(x: torch.Tensor, label: str, dims: int | tuple[int, ...] = -1, channel: int = -1) -> torch.Tensor:
    """Round with a scheme by its label."""
    return quantize_activations(x, ActivationScheme.parse(label), dims=dims, channel=channel)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ labels


LABELS = ("token-6", "sample-4-mse", "tensor-8-static-percentile", "map-3", "token-4-symmetric-hadamard-outliers16")


@pytest.mark.parametrize("label", LABELS)
def test_a_label_is_read_as_it_was_written(label: str) -> None:
    assert ActivationScheme.parse(label).label == label


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("token", "expected GRANULARITY-BITS such as 'token-6'"),
        ("token-2", "got 2 bits, expected 3 to 8"),
        ("token-6-static", "static ranges are those of a tensor"),
        ("tensor-6-static-outliers8", "outliers are found in the input itself"),
        ("channel-6", "tensor, sample, token, map"),
    ],
)
def test_a_label_that_says_nothing_sensible_is_refused(label: str, message: str) -> None:
    with pytest.raises(QuantDMError, match=message):
        ActivationScheme.parse(label)


def test_the_form_of_earlier_versions_is_read_as_what_it_meant() -> None:
    old = ActivationSpec.model_validate({"bits": 6, "keep_8bit": ["conv_in"]})
    assert old == ActivationSpec(default="map-6", patterns={"conv_in": "map-8"}, attention="map-6")
    assert ActivationSpec.model_validate(old.model_dump(mode="json")) == old
    assert old.bits == 6
    assert old.is_simulation
    assert not ActivationSpec(default="token-6").is_simulation
    for wrong in ({"bits": 5}, {"bits": 6, "keep": []}, {"bits": 6, "keep_8bit": "conv_in"}):
        with pytest.raises(ValueError, match="expected"):
            ActivationSpec.model_validate(wrong)


def test_rules_take_precedence_as_those_of_weights_and_patterns_reach_operation_types() -> None:
    model = make_transformer()
    name = "transformer_blocks.1.attn1.to_q"
    spec = ActivationSpec(
        default="token-4",
        types={"ff.net.2": "token-8", "attn1.to_q": "token-7"},
        patterns={"attn2.*": "token-5", "transformer_blocks.0.attn1.*": None},
        layers={name: "tensor-3"},
    )
    schemes = {layer: None if s is None else s.label for layer, s in spec.resolve(list_layers(model)).items()}
    assert schemes[name] == "tensor-3"
    assert schemes["transformer_blocks.0.attn1.to_q"] is None
    assert schemes["transformer_blocks.0.attn2.to_k"] == "token-5"
    assert schemes["transformer_blocks.0.ff.net.2"] == "token-8"
    assert schemes["proj_out"] == "token-4"
    with pytest.raises(QuantDMError, match=r"'ff\.net\.9' .*ff\.net\.2"):
        ActivationSpec(default="token-4", types={"ff.net.9": "token-8"}).resolve(list_layers(model))


# ---------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("bits", [3, 6, 8])
@pytest.mark.parametrize("dims", [-1, (2, 3)], ids=["token", "map"])
def test_every_range_has_at_most_2_to_the_bits_values_within_half_a_step(
    bits: int, dims: int | tuple[int, int]
) -> None:
    x = noise(2, 3, 20, 300) + 1
    y = rounded(x, f"token-{bits}", dims)
    step = (x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True)) / (2**bits - 1)
    assert ((y - x).abs() <= 0.5001 * step + 1e-6).all()
    grid = torch.round(y / step)
    assert (y - grid * step).abs().max() < 1e-4  # an integer zero point: every value is a multiple of the step
    assert (grid.amax(dims) - grid.amin(dims)).max() <= 2**bits - 1


def test_a_symmetric_grid_holds_zero_and_its_largest_value() -> None:
    x = noise(7, 50)
    y = rounded(x, "token-4-symmetric")
    largest = x.abs().amax(-1, keepdim=True)
    steps = y / (largest / 7)
    assert (steps - steps.round()).abs().max() < 1e-5
    assert torch.allclose(y.abs().amax(-1, keepdim=True), largest)


def test_tokens_and_maps_are_quantized_independently() -> None:
    x = noise(5, 40)
    loud = x.clone()
    loud[0] *= 1000
    assert torch.equal(rounded(x, "token-6")[1:], rounded(loud, "token-6")[1:])
    maps = x.view(1, 5, 5, 8)
    assert torch.equal(rounded(maps, "map-6", (2, 3))[:, 1:], rounded(loud.view(1, 5, 5, 8), "map-6", (2, 3))[:, 1:])


def test_values_on_the_grid_zeros_and_constants_stay_exact() -> None:
    grid = torch.arange(-20.0, 44.0)[None] / 4
    assert torch.equal(rounded(grid, "token-6"), grid)
    # Ends that round apart (half to even) would need 65 levels: the upper one is clipped.
    assert rounded(torch.tensor([[-1.5, 61.5]]), "token-6").tolist() == [[-2.0, 61.0]]
    assert torch.equal(rounded(torch.zeros(2, 5), "token-6"), torch.zeros(2, 5))
    torch.testing.assert_close(rounded(torch.full((2, 5), -7.3), "token-6"), torch.full((2, 5), -7.3))
    relu = noise(4, 50).relu()
    assert (rounded(relu, "token-6")[relu == 0] == 0).all()


def test_a_clipped_range_errs_less_than_the_full_one_and_a_percentile_leaves_the_tail_out() -> None:
    x = noise(3, 4000)
    x[:, 0] = 40.0
    error = {rule: (rounded(x, f"token-4{rule}") - x).square().mean() for rule in ("", "-mse")}
    assert error["-mse"] < error[""]
    body = (rounded(x, "token-4-percentile") - x)[:, 1:].square().mean()
    assert body < 0.05 * (rounded(x, "token-4") - x)[:, 1:].square().mean()


def test_more_bits_are_closer_and_powers_of_two_scale_along() -> None:
    x = noise(8, 200)
    error = {bits: (rounded(x, f"token-{bits}") - x).square().mean() for bits in (6, 8)}
    assert error[8] * 8 < error[6]
    assert torch.equal(rounded(4 * x, "token-6"), 4 * rounded(x, "token-6"))


def test_bf16_is_the_fp32_result_rounded_once_and_the_gradient_passes_straight_through() -> None:
    x = noise(4, 64).bfloat16()
    assert torch.equal(rounded(x, "token-8"), rounded(x.float(), "token-8").bfloat16())
    y = noise(4, 64).requires_grad_()
    quantized = rounded(y, "token-6")
    assert torch.equal(quantized, rounded(y.detach(), "token-6"))
    quantized.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))


# ---------------------------------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("variant", ["-hadamard", "-outliers8", "-outliers16"])
def test_every_remedy_repairs_what_outlier_channels_break(variant: str) -> None:
    x = noise(2, 30, 256)
    x[..., 17] *= 50
    plain = (rounded(x, "token-4") - x).square().sum()
    assert (rounded(x, f"token-4{variant}") - x).square().sum() < 0.1 * plain
    if variant == "-outliers16":
        assert torch.equal(rounded(x, f"token-4{variant}")[..., 17], x[..., 17])


# ------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_bits_order_the_error_and_switching_off_leaves_nothing_behind(make) -> None:
    model = make()
    exact, attributes = run(model), set(model.__dict__)
    error = {}
    for bits in (4, 6, 8):
        set_activation_bits_(model, ActivationSpec(default=f"token-{bits}", attention=f"token-{bits}"))
        count = hooks(model)
        set_activation_bits_(model, ActivationSpec(default=f"token-{bits}", attention=f"token-{bits}"))
        assert hooks(model) == count  # replaced, not stacked
        error[bits] = (run(model) - exact).square().mean().item()
    spec = usual_activations(model, 6)
    set_activation_bits_(model, spec)
    assert activation_spec(model) == spec
    kept = (run(model) - exact).square().mean().item()
    assert 0 < error[8] < kept < error[6] < error[4]
    set_activation_bits_(model, None)
    assert torch.equal(run(model), exact)
    assert hooks(model) == 0
    assert set(model.__dict__) == attributes
    assert activation_spec(model) is None


@pytest.mark.parametrize("granularity", ["tensor", "sample", "token", "map"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_scale_varies_only_where_the_granularity_says(make, granularity: str) -> None:
    model = make()
    seen: dict[str, torch.Tensor] = {}
    set_activation_bits_(model, ActivationSpec(default=f"{granularity}-4"))
    for record in list_layers(model):  # registered later, so these see what the layer sees in the end
        layer = model.get_submodule(record.name)
        layer.register_forward_hook(lambda _, args, out, name=record.name: seen.update({name: args[0]}))
    run(model)
    for record in list_layers(model):
        x, linear = seen[record.name], record.kind == "linear"
        pixels = linear or all(size == 1 for size in record.shape[2:])
        if granularity == "tensor":
            groups = [x.flatten()]
        elif granularity == "map" and not linear:
            groups = list(x.flatten(0, 1).flatten(1))
        elif granularity != "sample" and pixels:
            groups = list(x.movedim(-1 if linear else 1, -1).flatten(0, -2))
        else:
            groups = list(x.flatten(1))
        halves = 1 if record.split is None else 2
        assert all(len(group.unique()) <= 16 * halves for group in groups), record.name


def test_queries_keys_and_values_enter_the_product_quantized_and_probabilities_leave_the_softmax_so() -> None:
    q, k, v = (noise(1, 2, 6, 8, seed=seed) for seed in range(3))
    operands = ActivationScheme.parse("token-8")
    with QuantizedAttention(operands, None):
        y = F.scaled_dot_product_attention(q, k, v)
    expected = F.scaled_dot_product_attention(*(quantize_activations(x, operands) for x in (q, k, v)))
    assert torch.equal(y, expected)
    with QuantizedAttention(None, "uniform-8"):
        close = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril())
    assert torch.allclose(close, F.scaled_dot_product_attention(q, k, v, is_causal=True), atol=0.02)
    assert torch.equal(close, masked)
    p = (noise(4, 100) * 3).softmax(-1)
    for method in ("uniform", "log2", "shiftedlog2"):
        few, many = (quantize_probabilities(p, f"{method}-{bits}") for bits in (3, 6))
        assert len(many.unique()) <= 64
        assert method == "log2" or (many - p).square().sum() < (few - p).square().sum()
    powers = 2.0 ** -torch.arange(16.0)
    assert torch.equal(quantize_probabilities(powers, "log2-4"), powers)


def test_attention_is_quantized_only_while_the_denoiser_runs_even_if_it_fails() -> None:
    model = make_transformer()
    exact = run(model)
    set_activation_bits_(model, ActivationSpec(attention="token-3", probabilities="log2-3"))
    assert not torch.equal(run(model), exact)
    q = noise(1, 2, 6, 8)
    plain = F.scaled_dot_product_attention(q, q, q)
    with pytest.raises((RuntimeError, TypeError, AttributeError, ValueError)):
        model("no tensor")
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), plain)


def test_the_sensitive_types_are_the_ends_the_time_and_the_feed_forwards_end() -> None:
    model = make_transformer()
    assert set(sensitive_types(model)) == {
        "pos_embed.proj",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
        "ff.net.2",
        "proj_out",
    }
    kept = usual_activations(make_unet(), 6).resolve(list_layers(make_unet()))
    for name in ("conv_in", "conv_out", "time_embedding.linear_1"):
        assert kept[name].bits == 8  # type: ignore[union-attr]
    assert kept["mid_block.resnets.0.conv1"].bits == 6  # type: ignore[union-attr]
    assert len(SENSITIVE) == len(set(SENSITIVE))


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
    unet = make_unet()
    for network in (model, unet):
        record = next(record for record in list_layers(network) if record.split is not None)
        set_activation_bits_(network, ActivationSpec(default="token-6"))
        layer = network.get_submodule(record.name)
        seen: list[torch.Tensor] = []
        layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append(args[0]))
        dim = -1 if record.kind == "linear" else 1
        x = torch.randn(1, 3, layer.in_features) if dim == -1 else torch.randn(1, record.shape[1], 4, 4)
        loud = x.tensor_split([record.split], dim)[1]
        loud *= 1000  # with one range the first half would be rounded to zero
        layer(x)
        error = (seen[0] - x).tensor_split([record.split], dim)[0].abs().max()
        assert error < 0.1


def test_quantized_weights_and_activations_combine_and_a_copy_is_independent() -> None:
    model = make_transformer()
    for record in list_layers(model):
        layer = model.get_submodule(record.name)
        quantize_module_(model, record.name, quantize_weight(layer.weight, Scheme.parse("uniform-channel-4")))
    exact = run(model)
    set_activation_bits_(model, ActivationSpec(default="token-8"))
    changed = run(model)
    assert not torch.equal(changed, exact)
    other = copy.deepcopy(model)
    set_activation_bits_(other, None)
    assert torch.equal(run(other), exact)
    assert torch.equal(run(model), changed)


def test_a_layer_that_is_called_by_keyword_is_quantized_as_any_other() -> None:
    model = make_transformer()
    layer, x = model.proj_out, torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    exact = layer(x)
    set_activation_bits_(model, ActivationSpec(default="token-4"))
    assert torch.equal(layer(input=x), layer(x))
    assert not torch.equal(layer(input=x), exact)
    with pytest.raises(QuantDMError, match=r"proj_out: was called with x, expected its input"):
        layer(x=x)


def test_a_rule_that_matches_nothing_changes_nothing() -> None:
    model = make_transformer()
    spec = ActivationSpec(default="token-6")
    set_activation_bits_(model, spec)
    with pytest.raises(QuantDMError, match="no_such"):
        set_activation_bits_(model, ActivationSpec(default="token-6", patterns={"no_such*": "token-8"}))
    with pytest.raises(QuantDMError, match="static and have no ranges"):
        set_activation_bits_(model, ActivationSpec(default="tensor-6-static"))
    static = {record.name: ((-1.0, 1.0),) for record in list_layers(model)}
    for observed in ({"ranges": {**static, "unet.conv_in": ((0.0, 1.0),)}}, {"equalisers": {"unet.conv_in": "mm"}}):
        with pytest.raises(QuantDMError, match=r"unet\.conv_in is another model's.*\(1 in all\); observe it anew"):
            set_activation_bits_(model, ActivationSpec(default="token-6", **observed))
    for pair in ((1.0, -1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="expected two numbers, the smaller first"):
            ActivationSpec(default="tensor-6-static", ranges={**static, "proj_out": (pair,)})
    assert activation_spec(model) == spec
