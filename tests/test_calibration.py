"""Moments of the inputs: equal to X^T X of what the layers see, gathered in groups, and worth their trouble."""

import pytest
import torch
from torch import nn

from quantdm import QuantDMError, Scheme, get_denoiser, list_layers, load_protocol
from quantdm.activations import moments as calibration
from quantdm.activations.moments import gather_moments, input_vectors
from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.calls import Call, replay
from quantdm.metrics import relative_error
from quantdm.pipelines.generate import calibration_calls
from quantdm.quantizers import quantize_weight

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 7, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d stride padding": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "conv2d grouped dilated": (nn.Conv2d(6, 9, 3, groups=3, dilation=2, padding=2), (2, 6, 8, 7)),
    "conv2d depthwise same": (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (1, 4, 6, 6)),
    "conv2d reflect": (nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), (2, 3, 5, 5)),
    "conv3d": (nn.Conv3d(2, 4, (2, 3, 1), padding=(0, 1, 0)), (1, 2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_vectors_times_weights_are_the_output_of_the_layer(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    vectors = input_vectors(layer, x)
    groups = len(vectors)
    weight = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1)
    y = torch.cat(list(vectors @ weight.mT), dim=1) + layer.bias
    expected = layer(x)
    expected = expected.reshape(-1, expected.shape[-1]) if name == "linear" else expected.movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_the_mean_of_xtx(name):
    layer, shape = LAYERS[name]
    model = nn.Sequential(layer)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) for _ in range(3)]
    calls = [Call((x,), {}, model(x)) for x in inputs]
    found = gather_moments(model, calls, ["0"])["0"]
    X = torch.cat([input_vectors(layer, x).double() for x in inputs], dim=1)
    assert found.count == X.shape[1]
    assert found.second.dtype == torch.float32
    torch.testing.assert_close(found.second.double(), X.mT @ X / X.shape[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_of_wide_layers_are_summed_piece_by_piece(name, monkeypatch):
    monkeypatch.setattr(calibration, "WIDE", 1)
    monkeypatch.setattr(calibration, "PIECE", 4)
    monkeypatch.setattr(calibration, "ROWS", 5)
    test_moments_are_the_mean_of_xtx(name)


class ByKeyword(nn.Module):
    """Calls its layer as AnimateDiff's motion modules do."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(6, 5)

    def forward(self, x):
        return self.proj_in(input=x)


def test_inputs_that_are_given_by_keyword_are_seen():
    model, x = ByKeyword(), torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    found = gather_moments(model, [Call((x,), {}, model(x))], ["proj_in"])["proj_in"]
    torch.testing.assert_close(found.second[0], x.mT @ x / 7)


@pytest.fixture(scope="module")
def calls(dit):
    return calibration_calls(dit, load_protocol("digits-dit"), range(8), steps=8)


@pytest.fixture(scope="module")
def layers(dit):
    return list_layers(get_denoiser(dit))


@pytest.fixture(scope="module")
def moments(dit, calls, layers):
    return gather_moments(get_denoiser(dit), calls, [layer.name for layer in layers])


def test_calls_cover_all_timesteps(calls):
    assert len(calls) == 8


def test_groups_and_files_give_the_same_moments(dit, calls, layers, moments, tmp_path, monkeypatch):
    names = [layer.name for layer in layers[:6]]
    monkeypatch.setattr(calibration, "ROWS", 50)
    stored = gather_moments(get_denoiser(dit), calls, names, budget_bytes=2**18, folder=tmp_path)
    assert list(stored) == names
    for name in names:
        assert stored[name].count == moments[name].count
        torch.testing.assert_close(stored[name].second, moments[name].second, rtol=1e-4, atol=1e-5)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == len(names)
    again = gather_moments(get_denoiser(dit), calls, names, folder=tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert torch.equal(again[names[0]].second, stored[names[0]].second)
    assert not any(module._forward_pre_hooks for module in get_denoiser(dit).modules())


@pytest.mark.parametrize("other", ["weights", "inputs"])
def test_moments_of_another_model_or_protocol_are_not_taken_for_its_own(other, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        nn.init.zeros_(model[1].weight)  # as the last layers of ControlNets: all outputs are alike
        nn.init.zeros_(model[1].bias)
        return model

    mine, theirs = make(0), make(1 if other == "weights" else 0)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    y = 3 * x if other == "inputs" else x
    first = gather_moments(mine, [Call((x,), {}, mine(x))], ["1"], folder=tmp_path)["1"]
    second = gather_moments(theirs, [Call((), {"input": y}, theirs(y))], ["1"], folder=tmp_path)["1"]
    assert not torch.allclose(first.second, second.second)
    assert len(list(tmp_path.iterdir())) == 2


def test_moments_in_files_are_the_same_after_their_memory_was_let_go(tmp_path):
    model = nn.Linear(600, 2)
    x = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    calls = [Call((x,), {}, model(x))]
    held = gather_moments(nn.Sequential(model), [Call((x,), {}, model(x))], ["0"])["0"]
    found = gather_moments(nn.Sequential(model), calls, ["0"], folder=tmp_path)["0"]
    assert torch.equal(found.second, held.second)
    assert found.let_go is not None
    found.let_go()
    assert torch.equal(found.second, held.second)
    assert torch.equal(found.part(slice(3, 9)).second, held.second[:, 3:9, 3:9])


def test_what_cannot_be_calibrated_is_an_error(dit, calls):
    denoiser = get_denoiser(dit)
    with pytest.raises(QuantDMError, match="calls: got none"):
        gather_moments(denoiser, [], [])
    with pytest.raises(QuantDMError, match="no Linear or Conv layer"):
        gather_moments(denoiser, calls, ["nowhere"])
    idle = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    idle.forward = idle["used"].forward
    with pytest.raises(QuantDMError, match="idle: no input"):
        gather_moments(idle, [Call((torch.ones(1, 2),), {}, torch.ones(1, 2))], ["idle"])


class Pooling(nn.Module):
    """Reads the weight of its layer without calling it, as attention poolers do."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3)

    def forward(self, x):
        return nn.functional.linear(x, self.proj.weight, self.proj.bias)


def test_a_weight_that_is_read_without_a_call_counts_all_alike(caplog):
    model = nn.Sequential(Pooling(), nn.Linear(3, 2))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = gather_moments(model, [Call((x,), {}, model(x))], ["0.proj", "1"])
    assert torch.equal(found["0.proj"].second, torch.eye(4)[None])
    assert "0.proj: its module reads the weight without calling the layer; calibrated on nothing" in caplog.text
    assert found["1"].count == 5
    weight = model[0].proj.weight.detach()
    plain, fed = (quantize_weight(weight, Scheme.parse(label), moments=found["0.proj"] if "feed" in label else None)
                  for label in ("uniform-channel-3-p2", "uniform-channel-3-feedback"))  # fmt: skip
    errors = [float((weight - item.dequantize()).square().sum()) for item in (plain, fed)]
    assert errors[1] <= errors[0]


def test_moments_of_images_that_are_all_alike_are_used_and_said_to_be_few(caplog):
    model = nn.Linear(6, 4)
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).expand(9, 6)
    enough = gather_moments(nn.Sequential(model), [Call((x,), {}, model(x))], ["0"])
    assert "1 layer with fewer different input vectors than columns, first 0 (1 of 6)" in caplog.text  # nine in all
    caplog.clear()
    mixed = torch.cat([x, torch.randn(3, 6, generator=torch.Generator().manual_seed(1))])
    gather_moments(nn.Sequential(model), [Call((mixed,), {}, model(mixed)), Call((x,), {}, model(x))], ["0"])
    assert "first 0 (4 of 6)" in caplog.text
    caplog.clear()
    other = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
    gather_moments(nn.Sequential(model), [Call((other,), {}, model(other))], ["0"])
    assert "full rank" not in caplog.text
    steps = [Call((row.expand(5, 6),), {}, model(row.expand(5, 6))) for row in other[:3]]
    gather_moments(nn.Sequential(model), steps, ["0"])  # as a layer that embeds the timestep: no image changes that
    assert "full rank" not in caplog.text
    few = gather_moments(nn.Sequential(model), [Call((x[:3],), {}, model(x[:3]))], ["0"])
    for moments in (enough["0"], few["0"]):
        weight = model.weight.detach()
        for label in ("kmeans-channel-2-feedback", "uniform-channel-2-lowrank-1-feedback"):
            stored = quantize_weight(weight, Scheme.parse(label), moments=moments)
            assert float((x[0] @ (weight - stored.dequantize()).T).square().mean()) < 1e-3


def output_error(denoiser, calls):
    pairs = zip(replay(denoiser, calls), calls, strict=True)
    return sum(relative_error(output, call.output) for output, call in pairs)


@pytest.mark.parametrize(
    ("plain", "calibrated", "share"),
    [("kmeans-channel-3", "importance", 0.95), ("uniform-channel-3", "feedback", 0.6)],
)
def test_calibrated_options_lower_the_error_of_the_output(
    dit, calls, layers, moments, tmp_path, plain, calibrated, share
):
    options = [Scheme.parse(label) for label in (plain, f"{plain}-{calibrated}")]
    denoiser = get_denoiser(dit)
    bank = WeightBank(tmp_path, layers, options).build(denoiser, moments=moments)
    held_out = calibration_calls(dit, load_protocol("digits-dit"), range(100, 108), steps=8)[:-1]  # the last dwarfs all
    errors = []
    for scheme in options:
        with bank.applied(denoiser, {layer.name: scheme for layer in layers}):
            errors.append(output_error(denoiser, held_out))
    assert errors[1] < share * errors[0]
