"""Low-rank branches: their closed forms, and that a scheme with one is a scheme like any other."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantdm import QuantDMError, Recipe, get_denoiser, list_layers, load_pipeline
from quantdm.activations.codes import Grid, new_codes
from quantdm.allocation.candidates import baseline_choices
from quantdm.allocation.pruning import dominated
from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.analysis import trace_graph
from quantdm.hub.size import ExportSize
from quantdm.modules import quantize_module_
from quantdm.modules.blob import blob_size, join_tensors, split_blob
from quantdm.quantizers import Moments, QuantizedWeight, quantize_options, quantize_weight
from quantdm.quantizers.branches import add_branches, fit_branch, fits_rank
from quantdm.quantizers.objective import OutputError
from quantdm.quantizers.weight import count_bits
from quantdm.recipe.activations import ActivationScheme
from quantdm.runs.stages import _filled
from quantdm.runs.trials import first_trials
from quantdm.schemes import Scheme
from quantdm.surrogates import SearchSpace
from quantdm.tuning.weights import TunableWeight


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments_of(columns: int, *, rank: int | None = None, groups: int = 1) -> Moments:
    """Return moments of correlated inputs, of a lower rank than there are columns if that is given."""
    mixing = noise(groups, rank or columns, columns, seed=5)
    x = noise(groups, 500, rank or columns, seed=6) @ mixing * torch.logspace(0, -2, columns)
    return Moments(x.transpose(1, 2) @ x / 500, 500)


def of_rows(weight: Tensor, dense: Tensor, second: Tensor) -> float:
    return float(OutputError(weight.flatten(1), second).of_rows(dense.flatten(1)).sum())


@pytest.mark.parametrize("rank_of_h", [40, 7])
def test_the_branch_is_the_best_matrix_of_its_rank_under_h(rank_of_h: int) -> None:
    residual, second = noise(24, 40), moments_of(40, rank=rank_of_h).second
    # What no matrix of rank 4 can beat: the singular values behind the fourth of R H^(1/2) (Eckart, Young, Mirsky).
    values, vectors = torch.linalg.eigh(second[0].double())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    least = float(torch.linalg.svdvals(residual.double() @ root)[4:].square().sum())
    scheme = Scheme.parse("uniform-channel-4-lowrank-4-feedback")
    stored = fit_branch(residual, OutputError(residual, second), 4, 2.0**-12)
    found = of_rows(residual, add_branches(torch.zeros(24, 40), scheme, stored), second)
    assert least <= found <= 1.01 * least + 1e-6 * of_rows(residual, torch.zeros(24, 40), second)


def test_full_rank_leaves_what_eight_bits_leave() -> None:
    weight = noise(12, 20)
    found = quantize_weight(weight, Scheme.parse("uniform-channel-2-lowrank-12"))
    assert float((found.dequantize() - weight).square().mean()) < 1e-4


LABELS = (
    "uniform-channel-4-lowrank-3",
    "uniform-group64-3-symmetric-hadamard-lowrank-3-feedback",
    "kmeans-channel-3-fp16-lowrank-3-importance",
    "kmeans-channel-2-equalised50-lowrank-3-feedback",
    "kmeans-tensor-2-lowrank-3-feedback",
    "kmeans-shared64-3-lowrank-3",
    "log2-channel-4-lowrank-3",
)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize(
    ("shape", "split", "groups"),
    [((6, 128), None, 1), ((6, 128), 48, 1), ((8, 16, 3, 3), 4, 1), ((8, 4, 3, 3), None, 4)],
)
def test_a_scheme_with_a_branch_is_stored_decoded_and_counted_as_any_other(label, shape, split, groups) -> None:
    scheme = Scheme.parse(label)
    assert scheme.label == label
    weight, columns = noise(*shape), noise(*shape)[0].numel()
    moments = moments_of(columns, groups=groups)
    found = quantize_weight(weight, scheme, split=split, moments=moments)
    plain = count_bits(shape, scheme.without_branches, split)
    assert found.num_bits == plain + 3 * 8 * (shape[0] + columns) + 3 * 16 + 32
    blob = join_tensors(found.tensors, shape, scheme, split)
    assert len(blob) == blob_size(shape, scheme, split)
    again = QuantizedWeight.from_tensors(scheme, shape, split, found.dtype, split_blob(blob, shape, scheme, split))
    dense = found.dequantize()
    assert torch.equal(again.dequantize(), dense)
    assert torch.equal(TunableWeight(found)().detach(), dense)
    assert torch.equal(TunableWeight(found).stored().dequantize(), dense)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(found.dequantize(dtype=dtype), dense.to(dtype))
    out = torch.empty(shape[::-1], dtype=torch.bfloat16).permute(*reversed(range(len(shape))))
    assert torch.equal(found.dequantize(out=out), dense.bfloat16())
    if split is None:
        rows = torch.tensor([5, 0, 5])
        assert torch.equal(found.rows(rows), dense[rows])


@pytest.mark.parametrize("label", ["kmeans-channel-2-feedback", "uniform-channel-3-importance", "kmeans-tensor-2"])
def test_a_branch_takes_error_off_where_the_weight_has_large_directions(label: str) -> None:
    weight = noise(48, 64) * 0.1 + noise(48, 2, seed=1) @ noise(2, 64, seed=2)
    moments, scheme = moments_of(64), Scheme.parse(label)
    metric = torch.eye(64)[None] if scheme.calibration is None else moments.second
    if scheme.calibration == "importance":
        metric = torch.diag_embed(moments.importance)
    branched = scheme.model_copy(update={"lowrank": 4})
    plain, better = quantize_options(weight, [scheme, branched], moments=moments)
    assert of_rows(weight, better.dequantize(), metric) < 0.3 * of_rows(weight, plain.dequantize(), metric)


def test_many_options_at_once_are_those_of_each_alone() -> None:
    weight, moments = noise(16, 32), moments_of(32)
    labels = (
        "kmeans-channel-2-feedback",
        "kmeans-channel-2-lowrank-2-feedback",
        "uniform-channel-3-lowrank-2",
        "uniform-channel-3-lowrank-4",
        "uniform-channel-3-hadamard-lowrank-4-feedback",
    )
    schemes = [Scheme.parse(label) for label in labels]
    for scheme, found in zip(schemes, quantize_options(weight, schemes, moments=moments), strict=True):
        alone = quantize_weight(weight, scheme, moments=moments)
        assert found.scheme == scheme
        assert torch.equal(found.dequantize(), alone.dequantize())


LAYERS = (torch.nn.Linear(64, 8), torch.nn.Conv2d(16, 8, 3), torch.nn.Conv2d(16, 8, 3, groups=4))


@pytest.mark.parametrize("layer", LAYERS, ids=["linear", "conv", "grouped"])
@pytest.mark.parametrize("residency", ["packed", "int8", "dense"])
def test_a_packed_layer_with_a_branch_runs_in_every_residency(layer, residency) -> None:
    holder = torch.nn.Sequential(layer)
    found = quantize_weight(layer.weight, Scheme.parse("uniform-channel-4-lowrank-4"))
    x = noise(2, 64) if isinstance(layer, torch.nn.Linear) else noise(2, 16, 5, 5)
    expected = torch.func.functional_call(layer, {"weight": found.dequantize()}, (x,))
    packed = quantize_module_(holder, "0", found)
    packed.keep_(residency)  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(holder(x), expected)


@pytest.mark.parametrize("label", ["uniform-channel-6-lowrank-4", "uniform-channel-6-hadamard-lowrank-4"])
@pytest.mark.parametrize(
    "layer",
    [LAYERS[0], pytest.param(LAYERS[1], marks=pytest.mark.integer_convolution), LAYERS[2]],
    ids=["linear", "conv", "grouped"],
)
def test_integers_multiply_the_codes_and_the_branch_is_added(layer, label) -> None:
    holder = torch.nn.Sequential(layer)
    found = quantize_weight(layer.weight, Scheme.parse(label))
    packed = quantize_module_(holder, "0", found)
    packed.keep_("integer")  # type: ignore[operator]
    if getattr(layer, "groups", 1) > 1:
        assert "branch" in str(packed.obstacle)
        return
    assert packed.obstacle is None
    conv = isinstance(layer, torch.nn.Conv2d)
    x = noise(2, 16, 5, 5) if conv else noise(3, 64)
    scheme = ActivationScheme.parse("tensor-8-hadamard" if "hadamard" in label else "tensor-8")
    with torch.no_grad():
        coded = new_codes(x, scheme, Grid(tuple(range(x.dim())), 1 if conv else -1, None, None))
        expected = (F.conv2d if conv else F.linear)(coded.values(), found.dequantize(), layer.bias)
        assert torch.allclose(holder(coded), expected, atol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    weight = noise(6, 10)
    with pytest.raises(QuantDMError, match=r"to_q: got uniform-channel-4-lowrank-7 .* expected 6 at most"):
        quantize_weight(weight, Scheme.parse("uniform-channel-4-lowrank-7"), name="to_q")
    with pytest.raises(QuantDMError, match="fuse_lora"):
        quantize_weight(weight, Scheme.parse("uniform-channel-4-lora-2"))
    with pytest.raises(QuantDMError):
        Scheme.parse("uniform-channel-4-lowrank-0")
    with pytest.raises(ValueError, match="fuse_lora"):
        Recipe(model="digits-dit", default="uniform-channel-4-lora-2")


def test_a_layer_without_the_rank_of_an_option_is_never_given_it(tmp_path) -> None:
    denoiser = get_denoiser(load_pipeline("digits-dit"))
    layers, options = (
        list_layers(denoiser),
        (Scheme.parse("uniform-channel-4-lowrank-20"), Scheme.parse("kmeans-tensor-3")),
    )
    narrow = next(layer for layer in layers if layer.name == "pos_embed.proj")  # rows of 16 weights
    bank = WeightBank(tmp_path, [narrow], options).build(denoiser)
    assert bank.get(narrow.name, options[1]).scheme == options[1]
    with pytest.raises(QuantDMError, match=f"no option {options[0].label}"):
        bank.get(narrow.name, options[0])
    rows = [
        {o.label: (count_bits(la.shape, o, la.split), 0.1, 0.1 / o.bits**4) for o in options if fits_rank(la.shape, o)}
        for la in layers
    ]
    filled = np.array([_filled(row, [o.label for o in options]) for row in rows])
    bits, errors = filled[:, :, 0].astype(np.int64), filled[:, :, 2]
    space = SearchSpace(layers, trace_graph(denoiser), options, bits, errors, errors)
    small = space.layer_index[narrow.name]
    assert options[0].label in dominated(space)[narrow.name]
    choices = first_trials(space, 30, targets=[4.5], seed=0)
    assert 0 not in choices[:, small]
    assert (choices == 0).any()
    assert f"baseline: {options[0].label}" not in baseline_choices(space, 4.5)
    size = ExportSize(load_pipeline("digits-dit"))
    assert size.extremes(options)[0] <= size.of(space.config(choices[-1])) <= size.extremes(options)[1]
