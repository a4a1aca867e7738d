"""Other values for parameters: held up to a number of bytes, made at every reading beyond, and gone afterwards."""

import pytest
import torch
from torch import nn

from quantdm import QuantConfig, get_denoiser, list_layers
from quantdm.bank.pointed import pointed
from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.ensemble import join_weights
from quantdm.pipelines.loading import load_pipeline
from quantdm.schemes import Scheme


class Reader(nn.Module):
    """Calls one layer, and reads the weight of another without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(x) @ self.read.weight.T


def halves(network: nn.Module, made: list[str], room: float):
    """Return a context in which both weights are half of what they were, and note whenever one is made."""
    own = {name: value.detach().clone() for name, value in network.named_parameters()}

    def make(name: str):
        def values(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            made.append(name)
            return (own[name] / 2).to(device, dtype)

        return values

    context = pointed(network, room=room)
    return context, make


@pytest.mark.parametrize(("room", "first"), [(float("inf"), 2), (4 * 12, 1), (0, 0)])
def test_values_are_the_same_whether_held_or_made_when_read(room, first):
    network, x, made = Reader(), torch.randn(5, 3), []
    names, before = list(dict(network.named_parameters())), list(network.parameters())
    plain = network(x)
    wanted = nn.functional.linear(x, network.called.weight / 2, network.called.bias) @ (network.read.weight / 2).T
    context, make = halves(network, made, room)
    with context as point, torch.no_grad():
        for name in ("called.weight", "read.weight"):
            point(name, make(name))
        assert len(made) == first
        for calls in (1, 2):
            assert torch.equal(network(x), wanted)
            assert len(made) == first + calls * (2 - first)
    assert list(dict(network.named_parameters())) == names
    assert all(a is b for a, b in zip(network.parameters(), before, strict=True))
    assert (type(network.called), type(network.read)) == (nn.Linear, nn.Linear)
    assert torch.equal(network(x), plain)


@pytest.mark.parametrize("room", [float("inf"), 0])
def test_everything_is_put_back_after_an_error(room):
    network, made = Reader(), []
    before = {name: value.detach().clone() for name, value in network.named_parameters()}

    def use() -> None:
        context, make = halves(network, made, room)
        with context as point:
            point("called.weight", make("called.weight"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        use()
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


@pytest.mark.parametrize("room", [float("inf"), 0])
@pytest.mark.parametrize("twins", ["modules", "parameters"])
def test_two_names_of_one_parameter_have_the_last_values_and_are_put_back(twins, room):
    network = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    if twins == "modules":
        network["b"] = network["a"]
    network["b"].weight = network["a"].weight
    pointer, own = network["a"].weight.data_ptr(), network["a"].weight.detach().clone()
    with pointed(network, room=room) as point:
        point("a.weight", lambda dtype, device: own + 1)
        assert torch.equal(network["b"].weight, own + 1)
        point("b.weight", lambda dtype, device: own + 2)
        assert torch.equal(network["a"].weight, own + 2)
    assert network["a"].weight.data_ptr() == pointer
    assert torch.equal(network["a"].weight, own)


class Rooted(Reader):
    """Has a parameter of its own as well."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


def test_every_parameter_of_joined_denoisers_is_reached_without_room():
    parts = {"transformer": Rooted(), "transformer_2": Rooted()}
    joint, x = join_weights(parts), torch.randn(5, 3)
    assert "scale" in dict(joint.named_parameters(recurse=False))
    found = {}
    for room in (float("inf"), 0):
        with pointed(joint, room=room) as point, torch.no_grad():
            for name, value in [(name, value.detach().clone()) for name, value in joint.named_parameters()]:
                point(name, lambda dtype, device, v=value: v * 3)
            found[room] = [part(x) for part in parts.values()]
    for held, made in zip(*found.values(), strict=True):
        assert torch.equal(held, made)
    assert not torch.equal(found[0][0], parts["transformer"](x))


def test_what_is_wrong_while_values_are_made_is_told():
    network = Reader()

    def broken(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        raise AttributeError("no codes")

    with pointed(network, room=0) as point:
        point("called.weight", broken)
        with pytest.raises(RuntimeError, match="AttributeError: no codes"):
            network(torch.randn(5, 3))


def test_a_denoiser_larger_than_the_limit_answers_the_same_and_no_weight_is_kept(tmp_path):
    denoiser = get_denoiser(load_pipeline("digits-dit", torch_dtype=torch.float32))
    layers, scheme = list_layers(denoiser), Scheme.parse("uniform-channel-4")
    config = QuantConfig.uniform([layer.name for layer in layers], scheme)
    whole = 4 * sum(layer.num_weights for layer in layers)
    large = WeightBank(tmp_path, layers, [scheme], cache_bytes=whole).build(denoiser)
    small = WeightBank.open(tmp_path, layers, [scheme], cache_bytes=whole // 2)
    x, step, label = torch.randn(2, *_sample(denoiser)), torch.tensor([3, 500]), torch.tensor([0, 1])
    found = []
    for bank in (large, small):
        with bank.applied(denoiser, config), torch.no_grad():
            found.append(denoiser(x, step, class_labels=label, return_dict=False)[0])
    assert torch.equal(*found)
    assert large._dense
    assert not small._dense


def _sample(denoiser: nn.Module) -> tuple[int, int, int]:
    config = denoiser.config
    return config.in_channels, config.sample_size, config.sample_size
