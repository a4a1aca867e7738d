"""Layers that are quantized in processes are those that are quantized here, and nothing of it is left behind."""

import tempfile
from itertools import pairwise

import pytest
import torch

from quantdm import QuantDMError, apply_recipe, export_pipeline
from quantdm.activations import moments as gathering
from quantdm.activations.moments import LazyMoments
from quantdm.bank import processes
from quantdm.denoisers.calls import record_calls
from quantdm.hub import side_by_side
from quantdm.hub.side_by_side import Task, quantize_tasks
from quantdm.schemes import Scheme
from tests.test_streaming import PIPELINES, check_equal, recipe_for, stored

LABELS = ("uniform-channel-3-feedback", "kmeans-channel-3", "log2-channel-4", "kmeans-tensor-3-feedback")


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Let everything be done in processes, on two cores, and return those that are started; temporary files go here."""
    started, launch, folder = [], processes.launch, tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(processes, "SMALL", 0)
    monkeypatch.setattr(side_by_side, "cores", lambda: 2)
    monkeypatch.setattr(processes, "launch", lambda *a, **how: started.append(launch(*a, **how)) or started[-1])
    yield started
    assert all(process.returncode is not None for process in started)  # none is left
    assert not list(folder.iterdir())


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = (12, 16, 24, 8, 4)
    layers = [torch.nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
    return torch.nn.Sequential(*layers)


def lazy(network, budget_bytes):
    """Return moments that are gathered when they are asked for, groups of that many bytes at a time."""
    with record_calls(network) as recording, torch.no_grad():
        network(torch.randn(50, 12, generator=torch.Generator().manual_seed(1)))
    return LazyMoments(network, recording.calls, [str(i) for i in range(4)], budget_bytes=budget_bytes)


def tasks_of(network):
    """Return a task per layer, each of another scheme, the second in half precision."""
    return [
        Task(str(i), layer.weight.detach().to(torch.float16 if i == 1 else torch.float32), Scheme.parse(label), None)
        for i, (layer, label) in enumerate(zip(network, LABELS, strict=True))
    ]


def test_processes_give_what_is_given_here_and_moments_are_gathered_once(network, launched, monkeypatch):
    gathered, gather = [], gathering._gather
    monkeypatch.setattr(gathering, "_gather", lambda group, *a: gathered.append(list(group)) or gather(group, *a))
    done: list[int] = []
    found = quantize_tasks(tasks_of(network), lazy(network, 1), 1, workers=2, progress=lambda: done.append(1))
    assert 1 <= len(launched) <= 2
    assert gathered == [["0"], ["3"]]  # of the layers that are calibrated, each group once
    here = quantize_tasks(tasks_of(network), lazy(network, 2**20), 1, workers=1, progress=lambda: None)
    assert len(launched) <= 2
    assert len(done) == 4
    assert found.keys() == here.keys()
    for name, weight in found.items():
        other = here[name]
        assert (weight.scheme, weight.dtype, weight.shape) == (other.scheme, other.dtype, other.shape)
        assert weight.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in weight.tensors.items())


def test_a_layer_is_quantized_by_one_thread_of_torch(network, monkeypatch):
    before, seen, quantize = torch.get_num_threads(), [], side_by_side.quantize_weight
    monkeypatch.setattr(
        side_by_side, "quantize_weight", lambda *a, **how: seen.append(torch.get_num_threads()) or quantize(*a, **how)
    )
    torch.set_num_threads(4)
    try:
        quantize_tasks(tasks_of(network)[1:3], {}, 0, workers=1, progress=lambda: None)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


def test_a_bad_weight_is_one_clear_error(network, launched):
    good, *_, bad = tasks_of(network)
    torch.nn.init.constant_(bad.weight, torch.nan)
    with pytest.raises(QuantDMError, match=r"^3: got 32 NaN or infinite weights"):
        quantize_tasks([good, bad], lazy(network, 2**20), 1, workers=2, progress=lambda: None)


def test_an_export_in_processes_is_what_apply_and_save_give(launched, tmp_path):
    live = stored(PIPELINES["clip"](), tmp_path / "source", torch.bfloat16)
    recipe = recipe_for(live)
    made = export_pipeline(tmp_path / "source", recipe, tmp_path / "made")
    by_export = len(launched)
    assert by_export
    apply_recipe(live, recipe, insist=True).save_pretrained(tmp_path / "live")
    assert len(launched) > by_export
    check_equal(made, tmp_path / "live")
