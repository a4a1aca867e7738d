"""One-layer errors from backward passes, against the errors themselves."""

import logging
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from quantdm import QuantDMError, Scheme
from quantdm.bank.weight_bank import WeightBank
from quantdm.denoisers.calls import Call, record_calls, replay
from quantdm.denoisers.propagation import propagated_errors
from quantdm.files import read_json
from quantdm.metrics import relative_error
from quantdm.pipelines.generate import generate
from quantdm.pipelines.subject import look_at
from quantdm.quantizers.branches import fits_rank
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Probe
from quantdm.runs.propagated import Pass, propagated
from quantdm.runs.search import start_run
from quantdm.runs.sensitivities import PASSES, needed_passes
from quantdm.runs.settings import FULL, QUICK, Effort
from quantdm.runs.stages import build_bank, measure_space
from quantdm.runs.store import TrialStore
from quantdm.surrogates.ranking import spearman
from tests.walk_kinds import make, protocol_of

LABELS = ("kmeans-channel-2", "kmeans-channel-3", "kmeans-channel-4", "uniform-channel-5")
OPTIONS = tuple(map(Scheme.parse, LABELS))
EFFORT = Effort(
    label_images=2, label_steps=4, verify_images=2, noise_images=4, noise_steps=4, noise_signs=256
)  # fmt: skip


class Scaled(nn.Linear):
    """A layer whose product is not the one that its kind has."""

    def forward(self, input):
        return 3 * super().forward(input)


class Net(nn.Module):
    """Every kind of layer on its way to one number a sample: its error is then told by a single backward pass."""

    def __init__(self, wide: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.twice = nn.Linear(8, 8)
        self.out = nn.Linear(8, wide, bias=False)
        self.idle, self.scaled = nn.Linear(8, 8), Scaled(8, 8)

    def forward(self, x):
        y = self.grouped(x).flatten(2).mT  # [B, places, 8]
        y += 1  # in place, behind a layer
        y = self.twice(self.twice(y))
        with torch.no_grad():
            self.idle(y)
        return self.out(self.scaled(y)).sum(dim=1)


def recorded(net, samples=5):
    x = torch.randn(samples, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Call((x,), {}, net(x))


def measured(net, call, name, error):
    weight = net.get_submodule(name).weight
    with torch.no_grad():
        weight += error
        changed = net(*call.args)
        weight -= error
    return relative_error(changed, call.output)


def small_errors(net, name, scales=(1e-4, 2e-4)):
    shape = net.get_submodule(name).weight.shape
    return [scale * torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) for scale in scales]


@pytest.mark.parametrize("name", ["grouped", "twice", "out"])
def test_of_one_number_a_sample_a_single_pass_tells_the_error_itself(name):
    net = Net()
    call = recorded(net)
    found = propagated_errors(net, call, [name], partial(small_errors, net), seed=0)
    expected = [measured(net, call, name, error) for error in small_errors(net, name)]
    assert found[name] == pytest.approx(expected, rel=2e-2)  # `twice` is not linear in its error


def test_of_many_numbers_the_mean_over_signs_comes_as_near_as_it_should():
    net, seeds = Net(wide=24), 200
    call = recorded(net)
    names = ["grouped", "twice", "out"]
    runs = [propagated_errors(net, call, names, partial(small_errors, net), seed=seed) for seed in range(seeds)]
    for name in names:
        values = np.array([run[name][0] for run in runs])
        expected = measured(net, call, name, small_errors(net, name)[0])
        assert abs(values.mean() / expected - 1) < 4 * values.std() / values.mean() / seeds**0.5
        assert values.std() / values.mean() < 2 * (2 / len(call.output)) ** 0.5  # samples are squared apart
    assert runs[0] == propagated_errors(net, call, names, partial(small_errors, net), seed=0)


def test_layers_without_gradients_are_missing_and_the_network_is_left_as_it_was():
    net = Net()
    call, before = recorded(net), {key: value.clone() for key, value in net.state_dict().items()}
    net.twice.weight.requires_grad_(False)
    found = propagated_errors(net, call, ["grouped", "twice", "idle", "scaled"], partial(small_errors, net), seed=0)
    assert found.keys() == {"grouped", "twice"}
    assert [p.requires_grad for p in net.parameters()] == [True, True, False] + 6 * [True]
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not net.twice._forward_hooks
    other = Call(call.args, {}, call.output * 1.1)
    with pytest.raises(RuntimeError, match="its output is another where gradients are wanted"):
        propagated_errors(net, other, ["out"], partial(small_errors, net), seed=0)
    nn.init.zeros_(net.out.weight)
    silent = Call(call.args, {}, torch.zeros_like(call.output))
    assert propagated_errors(net, silent, ["out"], partial(small_errors, net), seed=0) == {}


def test_what_blocks_compute_anew_is_what_they_computed_and_they_stop_doing_so(dit, monkeypatch):
    denoiser = dit.transformer
    with record_calls(denoiser, steps=[1]) as recording:
        dit([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    names = [layer.name for layer in look_at(dit).layers]
    found = []
    for supported in (True, False):
        monkeypatch.setattr(type(denoiser), "_supports_gradient_checkpointing", supported)
        ask = partial(small_errors, denoiser)
        found.append(propagated_errors(denoiser, recording.calls[0], names, ask, seed=3))
        assert not denoiser.is_gradient_checkpointing
    assert found[0].keys() == found[1].keys() == set(names)
    assert [found[0][name] for name in names] == [pytest.approx(found[1][name], rel=1e-3) for name in names]


def opened(folder, dit, **changed):
    return start_run(
        look_at(dit), folder, target_bits=3.0, trials=30, options=OPTIONS, effort=replace(EFFORT, **changed)
    )


def spaces_of(tmp_path, dit, signs):
    run, subject = opened(tmp_path / str(signs), dit, noise_signs=signs)
    if (tmp_path / "bank").exists():
        shutil.copytree(tmp_path / "bank", run.path("bank"))
    bank = build_bank(run, subject)
    if not (tmp_path / "bank").exists():
        shutil.copytree(run.path("bank"), tmp_path / "bank")
    with Engine(run, subject, workers=1) as engine:
        return run, measure_space(run, engine, subject, bank)


def test_backward_passes_rank_options_as_measuring_them_does(dit, tmp_path):
    run, told = spaces_of(tmp_path, dit, 192)
    _, measured_space = spaces_of(tmp_path, dit, None)
    x, y = np.log(told.noise_error).ravel(), np.log(measured_space.noise_error).ravel()
    assert spearman(x, y) > 0.98 > spearman(np.log(told.weight_error).ravel(), y)
    assert abs((x - y).mean()) < 0.1
    assert (x - y).std() < 0.4
    assert len(TrialStore(run.path(PASSES)).keys()) == 8  # of 4 images, twice each under guidance, at 3 of 4 steps


def test_passes_are_kept_and_two_runs_of_equal_settings_end_alike(dit, tmp_path, monkeypatch):
    run, subject = opened(tmp_path / "run", dit, noise_signs=64)
    bank = build_bank(run, subject)
    asked = []
    monkeypatch.setattr(Evaluator, "propagate", counted_propagate(asked, Evaluator.propagate, stop_at=2))
    with pytest.raises(QuantDMError, match="stop here"), Engine(run, subject, workers=1) as engine:
        measure_space(run, engine, subject, bank)
    assert [each.seed for each in asked] == [0, 1]
    asked.clear()
    monkeypatch.setattr(Evaluator, "propagate", counted_propagate(asked, Evaluator.propagate.inner))
    with Engine(run, subject, workers=1) as engine:
        first = measure_space(run, engine, subject, bank)
    assert [each.seed for each in asked] == [1, 2]  # the first pass was there
    again = tmp_path / "again"
    run, subject = opened(again, dit, noise_signs=64)
    shutil.copytree(tmp_path / "run" / "bank", again / "bank")
    with Engine(run, subject, workers=1) as engine:
        second = measure_space(run, engine, subject, build_bank(run, subject))
    assert np.array_equal(first.noise_error, second.noise_error)


def counted_propagate(asked, inner, stop_at=None):
    def propagate(self, each):
        asked.append(each)
        if len(asked) == stop_at:
            raise QuantDMError("stop here")
        return inner(self, each)

    propagate.inner = inner
    return propagate


def test_a_network_without_a_way_back_is_measured_layer_by_layer_and_told_so(dit, tmp_path, monkeypatch, caplog):
    run, subject = opened(tmp_path / "run", dit, noise_images=1, label_steps=1)
    bank = build_bank(run, subject)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("derivative of this is not implemented\nmore of it")

    monkeypatch.setattr("quantdm.runs.propagated.propagated_errors", refuse)
    with caplog.at_level(logging.WARNING), Engine(run, subject, workers=1) as engine:
        space = measure_space(run, engine, subject, bank)
    assert "transformer: has no backward pass here (derivative of this is not implemented)" in caplog.text
    assert f"{len(space.layers)} layers not told by backward passes" in caplog.text
    assert (space.noise_error > 0).all()
    assert read_json(run.path("sensitivity.json"), version=1)["noise_error"].keys() == set(space.layer_names)


def test_what_few_layers_or_many_passes_would_take_is_measured_instead(dit, tmp_path):
    assert needed_passes(32, 512, layers=100, options=4) == 16
    assert needed_passes(1000, 512, layers=100, options=4) == 1
    assert needed_passes(32, 512, layers=32, options=4) is None  # 16 x 8 forward passes, or 32 x 4
    run, subject = opened(tmp_path / "run", dit, noise_images=1, label_steps=1, noise_signs=10_000)
    bank = build_bank(run, subject)
    with Engine(run, subject, workers=1) as engine:
        space = measure_space(run, engine, subject, bank)
        assert len(TrialStore(run.path(PASSES)).keys()) == 1
        name = space.layer_names[5]
        assert space.noise_error[5].tolist() == pytest.approx(engine.local.sensitivity(Probe(name, LABELS)), rel=1e-3)


@pytest.mark.parametrize("kind", ["wan-2.2", "pixart-sigma"])
def test_several_denoisers_and_halves_of_a_call_tell_the_same_errors(kind, tmp_path, monkeypatch):
    subject, protocol = look_at(make(kind)), protocol_of(kind)
    options = (OPTIONS[1], Scheme.parse("uniform-channel-5-lowrank-12"))  # the second is too much for narrow layers
    bank = WeightBank(tmp_path / "bank", subject.layers, options).build(subject.weights)
    with subject.recording(subject.pipe, dict.fromkeys(subject.part_names, (0, 1))) as seen:
        generate(subject.pipe, protocol, [1, 2], steps=protocol.steps)
    calls = {part: recording.calls for part, recording in seen.items()}
    labels = tuple(option.label for option in options)

    def mean():
        passes = [propagated(subject, bank, calls, Pass(seed, labels)) for seed in range(40)]
        assert not any(each["without"] for each in passes)
        assert passes[0]["draws"] == min(sum(len(call.output) for call in own) for own in calls.values())
        return {
            name: {label: np.mean([each["errors"][name][label] for each in passes]) for label in own}
            for name, own in passes[0]["errors"].items()
        }

    whole = mean()
    assert whole.keys() == {layer.name for layer in subject.layers}
    for layer in subject.layers[::3]:
        assert whole[layer.name].keys() == {o.label for o in options if fits_rank(layer.shape, o)}
        part = subject.part_of(layer.name)
        with bank.applied(subject.weights, {layer.name: options[0]}):
            outputs = replay(subject.denoisers[part], calls[part])
        pairs = zip(outputs, calls[part], strict=True)
        measured = sum(relative_error(out, call.output) for out, call in pairs) / len(calls[part])
        assert whole[layer.name][options[0].label] == pytest.approx(measured, rel=1.0)

    def scarce(denoiser, call, *args, **settings):
        if len(call.output) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return propagated_errors(denoiser, call, *args, **settings)

    monkeypatch.setattr("quantdm.runs.propagated.propagated_errors", scarce)
    halves = mean()
    ratios = [np.log(halves[name][label] / whole[name][label]) for name in whole for label in whole[name]]
    assert abs(np.mean(ratios)) < 0.25
    assert np.std(ratios) < 0.6


def test_a_run_begun_before_goes_on_measuring(dit, tmp_path):
    run, _ = opened(tmp_path / "run", dit, noise_signs=None)
    again, _ = opened(tmp_path / "run", dit, noise_signs=512)
    assert again.settings == run.settings
    assert again.settings.noise_signs is None


def test_an_error_that_is_not_finite_is_left_out(dit, tmp_path, monkeypatch):
    run, subject = opened(tmp_path / "run", dit, noise_signs=64)
    evaluator = Evaluator(run, subject) if build_bank(run, subject) else None
    names = [layer.name for layer in subject.layers]
    broken = {name: [float("nan"), 1.0, 2.0, 3.0] for name in names}
    monkeypatch.setattr("quantdm.runs.propagated.propagated_errors", lambda *_, **__: broken)
    found = evaluator.propagate(Pass(0, LABELS))["errors"]
    assert {tuple(own) for own in found.values()} == {LABELS[1:]}


def test_levels_say_over_how_many_signs_errors_are_averaged():
    assert FULL.noise_signs == 512 > QUICK.noise_signs == 128
    with pytest.raises(QuantDMError, match=r"noise_signs: got 0, expected 1 or more"):
        Effort(noise_signs=0)
