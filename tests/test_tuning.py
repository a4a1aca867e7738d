"""Tuning: the held-out loss falls, the bytes stay, an interrupted training ends as an undisturbed one."""

from dataclasses import replace

import pytest
import torch

from quantdm import Scheme, get_denoiser, list_layers, load_protocol
from quantdm.errors import QuantDMError
from quantdm.pipelines.fingerprint import fingerprint
from quantdm.pipelines.generate import calibration_calls
from quantdm.quantizers import Moments, count_bits, quantize_weight
from quantdm.tuning import TuneSettings, tune
from quantdm.tuning.train import take_rows
from quantdm.tuning.weights import TunableWeight
from tests.random_weights import gaussian

SETTINGS = TuneSettings(steps=12, rows=8, every=4)
LABELS = [
    "kmeans-channel-2",
    "kmeans-channel-3-fp16",
    "kmeans-tensor-3",
    "kmeans-group24-2",
    "kmeans-shared-3",
    "kmeans-shared24-3",
    "uniform-channel-3",
    "uniform-group24-2",
    "uniform-channel-2-symmetric",
    "uniform-tensor-3",
    "log2-channel-3",
]


@pytest.fixture(scope="module")
def calls(dit):
    protocol = load_protocol("digits-dit")
    return [calibration_calls(dit, protocol, range(first, first + 8), steps=4) for first in (0, 100)]


@pytest.fixture(scope="module")
def weights(dit):
    denoiser = get_denoiser(dit)
    scheme = Scheme.parse("kmeans-channel-2")
    return {
        layer.name: quantize_weight(denoiser.get_parameter(f"{layer.name}.weight"), scheme, split=layer.split)
        for layer in list_layers(denoiser)
    }


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("split", [None, 20])
def test_before_training_a_tunable_weight_is_the_stored_one(label: str, split: int | None) -> None:
    weight = quantize_weight(gaussian(12, 50), Scheme.parse(label), split=split)
    tunable = TunableWeight(weight)
    assert torch.allclose(tunable(), weight.dequantize(dtype=torch.float32), rtol=1e-6, atol=0)
    again = tunable.stored()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_a_small_table_with_large_scales_is_stored_as_it_is() -> None:
    weight = quantize_weight(gaussian(12, 50), Scheme.parse("kmeans-shared-2"))
    share = 60_000 / float(weight.tensors["scale"].abs().max())
    scale, table = weight.tensors["scale"].float() * share, weight.tensors["codebook"].float() / share
    large = replace(weight, tensors={**weight.tensors, "scale": scale.half(), "codebook": table.half()})
    assert float(large.tensors["scale"].abs().max()) > 2**15
    assert torch.equal(TunableWeight(large).stored().dequantize(), large.dequantize())


@pytest.mark.parametrize("label", LABELS)
def test_what_is_trained_is_what_is_stored_in_the_same_bytes(label: str) -> None:
    target, weight = 1.1 * gaussian(12, 50), quantize_weight(gaussian(12, 50), Scheme.parse(label))
    tunable = TunableWeight(weight)
    before = float((tunable() - target).detach().square().sum())
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": 0.01 * float(p.detach().abs().mean())} for p in tunable.parameters() if p.requires_grad]
    )
    for _ in range(60):
        optimizer.zero_grad()
        (tunable() - target).square().sum().backward()
        optimizer.step()
    stored = tunable.stored()
    assert float((stored.dequantize() - target).square().sum()) < before
    assert torch.allclose(stored.dequantize(), tunable().detach(), rtol=2e-3, atol=1e-3)
    assert stored.nbytes == weight.nbytes
    assert stored.num_bits == count_bits((12, 50), stored.scheme)


def test_tuning_lowers_the_held_out_loss_and_leaves_the_denoiser_alone(dit, calls, weights) -> None:
    denoiser = get_denoiser(dit)
    before, wanted = fingerprint(denoiser), [p.requires_grad for p in denoiser.parameters()]
    tuned = tune(denoiser, weights, *calls, SETTINGS, others_dtype=torch.float16)
    assert [step for step, _ in tuned.curve] == [0, 4, 8, 12]
    assert tuned.helps
    assert min(loss for _, loss in tuned.curve) < 0.8 * tuned.curve[0][1]
    assert fingerprint(denoiser) == before
    assert [p.requires_grad for p in denoiser.parameters()] == wanted
    assert all(p.grad is None for p in denoiser.parameters())
    assert all(tuned.weights[name].nbytes == weight.nbytes for name, weight in weights.items())
    assert tuned.others.keys() == {name for name, p in denoiser.named_parameters() if p.dim() == 1}
    assert all(torch.equal(value, value.half().float()) for value in tuned.others.values())


class _Stop(Exception):  # noqa: N818 - no error
    pass


def test_an_interrupted_tuning_ends_as_an_undisturbed_one(dit, calls, weights, tmp_path) -> None:
    denoiser, checkpoint = get_denoiser(dit), tmp_path / "checkpoint.safetensors"
    steps = 0

    def stop(count: int) -> None:
        nonlocal steps
        steps += count
        if steps == 7:
            raise _Stop

    with pytest.raises(_Stop):
        tune(denoiser, weights, *calls, SETTINGS, checkpoint=checkpoint, progress=stop)
    assert checkpoint.is_file()
    again: list[int] = []
    resumed = tune(denoiser, weights, *calls, SETTINGS, checkpoint=checkpoint, progress=again.append)
    assert again[0] == 4  # what the checkpoint had
    finished: list[int] = []
    tune(denoiser, weights, *calls, SETTINGS, checkpoint=checkpoint, progress=finished.append)
    assert finished == [12]  # a finished training is not repeated
    whole = tune(denoiser, weights, *calls, SETTINGS)
    assert resumed.curve == whole.curve
    for name, weight in whole.weights.items():
        assert all(torch.equal(tensor, resumed.weights[name].tensors[key]) for key, tensor in weight.tensors.items())


def test_a_tuning_that_diverges_gives_the_untuned_weights_back(dit, calls, weights) -> None:
    settings = TuneSettings(steps=8, rows=8, every=2, rate=0.99)
    tuned = tune(get_denoiser(dit), weights, *calls, settings)
    assert not tuned.helps
    for name, weight in weights.items():
        assert torch.equal(tuned.weights[name].dequantize(), weight.dequantize())


def test_moments_of_inputs_and_tuning_do_not_change_what_a_scheme_stores() -> None:
    moments = Moments(torch.eye(50)[None], 10)
    weight = quantize_weight(gaussian(12, 50), Scheme.parse("kmeans-shared24-3-feedback"), moments=moments)
    assert TunableWeight(weight).stored().tensors.keys() == weight.tensors.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps: got 0"), ({"rate": 2.0}, "rate: got 2.0"), ({"every": 0}, "every: got 0")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(QuantDMError, match=message):
        TuneSettings(**settings)


def test_no_calls_are_refused(dit, weights) -> None:
    with pytest.raises(QuantDMError, match="got 0 calls"):
        tune(get_denoiser(dit), weights, [], [], SETTINGS)


def test_rows_are_taken_of_nested_conditions_and_of_frames_but_not_of_positions() -> None:
    rows, count = torch.tensor([2, 0]), 3
    sample, frames, tokens = (
        torch.arange(6.0).view(3, 2),
        torch.arange(12.0).view(6, 1, 2),
        torch.arange(9.0).view(3, 3),
    )
    call = ((sample,), {"cond": {"text": sample, "list": [sample, None]}, "frames": frames, "img_ids": tokens, "t": 5})
    (taken,), kwargs = take_rows(call, rows, count)
    assert torch.equal(taken, sample[rows])
    assert torch.equal(kwargs["cond"]["text"], sample[rows])
    assert torch.equal(kwargs["cond"]["list"][0], sample[rows])
    assert kwargs["cond"]["list"][1] is None
    assert torch.equal(kwargs["frames"], torch.cat([frames[4:6], frames[0:2]]))
    assert torch.equal(kwargs["img_ids"], tokens)
    assert kwargs["t"] == 5
    wide = torch.arange(24.0).view(12, 2)  # a matrix of another length counts something else
    assert torch.equal(take_rows(wide, rows, count), wide)


def test_what_starts_near_the_goal_is_not_shaken(dit, calls) -> None:
    denoiser, scheme = get_denoiser(dit), Scheme.parse("kmeans-channel-4")
    near = {
        layer.name: quantize_weight(denoiser.get_parameter(f"{layer.name}.weight"), scheme, split=layer.split)
        for layer in list_layers(denoiser)
    }
    tuned = tune(denoiser, near, *calls, TuneSettings(steps=6, rows=8, every=1))
    assert max(loss for _, loss in tuned.curve) < 1.5 * tuned.curve[0][1]
