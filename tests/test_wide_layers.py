"""Wide layers: the second moments of their inputs are what takes memory, and are there twice at most."""

import gc
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantdm import Scheme
from quantdm.bank.processes import room_of
from quantdm.files import save_tensors
from quantdm.machine import IN_FLIGHT
from quantdm.pipelines.tensor_files import map_tensor
from quantdm.quantizers import Moments, feedback, fit, quantize_options
from quantdm.quantizers import moments as moments_module
from quantdm.quantizers.feedback import DAMPING, factorize

LABELS = (
    "kmeans-channel-3-feedback", "uniform-channel-4-importance", "kmeans-shared-2-feedback",
    "uniform-channel-8-feedback", "kmeans-group64-4-feedback", "uniform-channel-4",
)  # fmt: skip


def spd(groups: int, n: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Return second moments [G, n, n] of `rank` input vectors, correlated, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rank, n, generator=generator) @ torch.randn(n, n, generator=generator) / n**0.5
    x *= torch.rand(n, generator=generator) * 3
    return x.mT @ x / rank


@pytest.fixture
def few_rows(monkeypatch):
    """Work on few rows at a time, as the widest layers do."""
    monkeypatch.setattr(feedback, "ROWS", 64)
    monkeypatch.setattr(moments_module, "ROWS", 64)


@pytest.mark.parametrize(("groups", "n", "rank"), [(1, 300, 900), (3, 64, 500), (2, 130, 20), (1, 1, 5), (1, 129, 400)])
def test_the_factor_in_place_is_the_factor_bit_by_bit(few_rows, groups, n, rank):
    second = spd(groups, n, rank)
    before = second.clone()
    found = factorize(Moments(second, rank), "layer")
    assert torch.equal(second, before)
    back = found.order.flip(1)
    turned = torch.stack([second[g][back[g]][:, back[g]] for g in range(groups)])
    mean = second.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    turned.diagonal(dim1=1, dim2=2).add_(DAMPING * mean)
    lower = torch.linalg.cholesky(turned)
    scale = lower.diagonal(dim1=1, dim2=2)[:, None]
    assert torch.equal(found.factor, (lower / scale).flip(1, 2))
    assert found.factor.is_contiguous()


def test_damping_begins_anew_with_what_was_given(few_rows):
    n = 70
    second = spd(1, n, 200)
    second[0, 0, 1] = second[0, 1, 0] = 3 * second[0].diagonal().max()  # no moments at all: more damping, then enough
    found = factorize(Moments(second, 1), "layer")
    back, mean = found.order[0].flip(0), second[0].diagonal().mean()
    damped, damping = second[0].diagonal()[back].clone(), DAMPING
    turned = second[0][back][:, back]
    for _ in range(4):
        damped += damping * mean
        turned.diagonal().copy_(damped)
        lower, info = torch.linalg.cholesky_ex(turned)
        if not info:
            break
        damping *= 10
    assert damping > DAMPING
    assert torch.equal(found.factor[0], (lower / lower.diagonal()).flip(0, 1))


class Counting(TorchDispatchMode):
    """Counts the bytes of all tensors that are made and still there, and remembers the most."""

    def __init__(self, *there: torch.Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in there}  # before: not counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what came out."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def stored(tmp_path, second):
    """Return moments in a file, as a run has them."""
    save_tensors(tmp_path / "m.safetensors", {"second": second}, {"count": 900})
    found, _, let_go = map_tensor(tmp_path / "m.safetensors", "second")
    return Moments(found, 900, let_go)


@pytest.mark.parametrize("split", [None, 40])
def test_moments_of_a_file_and_of_memory_give_the_same_weight(few_rows, split, tmp_path):
    weight = torch.randn(24, 96, 2, 1, generator=torch.Generator().manual_seed(3))
    second, schemes = spd(1, 192, 900), [Scheme.parse(label) for label in LABELS]
    kept = quantize_options(weight, schemes, split=split, moments=Moments(second, 900), sweeps=1)
    read = quantize_options(weight, schemes, split=split, moments=stored(tmp_path, second), sweeps=1)
    alone = [quantize_options(weight, [s], split=split, moments=Moments(second, 900), sweeps=1)[0] for s in schemes]
    for a, b, c in zip(kept, read, alone, strict=True):
        assert a.tensors.keys() == b.tensors.keys() == c.tensors.keys()
        assert all(
            torch.equal(a.tensors[k], b.tensors[k]) and torch.equal(a.tensors[k], c.tensors[k]) for k in a.tensors
        )


@pytest.mark.parametrize("filed", [True, False])
@pytest.mark.parametrize("split", [None, 256])
def test_feedback_takes_room_for_one_factor_beside_the_moments(few_rows, split, filed, tmp_path, monkeypatch):
    """Those in a file are held in memory as well, a half at a time; the factor replaces what it is made from."""
    monkeypatch.setattr(fit, "LARGE", 0)
    columns = 1024
    second = spd(1, columns, 64)
    second.diagonal(dim1=1, dim2=2).add_(0.5)
    weight = torch.randn(8, 512, 2, generator=torch.Generator().manual_seed(1))
    schemes = [Scheme.parse(label) for label in LABELS]
    moments = stored(tmp_path, second) if filed else Moments(second, 900)
    gc.collect()
    with Counting(moments.second, weight) as counted:
        quantize_options(weight, schemes, split=split, moments=moments, sweeps=1)
    half = second.nbytes if split is None else second.nbytes // 4
    expected = 2 * half if filed else half
    assert expected <= counted.most < expected + second.nbytes / 4


def test_layers_that_are_worked_on_together_have_their_moments_counted():
    plain, fed = ([Scheme.parse(label)] for label in ("uniform-channel-4", "uniform-channel-4-feedback"))
    assert 2 * room_of((1280, 1280, 3, 3), plain, None) < IN_FLIGHT  # two at once
    assert 2 * room_of((1280, 1280, 3, 3), fed, None) > IN_FLIGHT
    rooms = [room_of((1280, 2560, 3, 3), fed, split) for split in (1280, 640, None)]
    assert all(a < b for a, b in pairwise(rooms))
