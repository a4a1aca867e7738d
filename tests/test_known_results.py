"""Shapes that are known already are those that PyTorch would compute, and whatever shares memory is computed anew."""

import pytest
import torch

from quantdm.denoisers.known_results import KnownResults

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kind(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add.Tensor, (meta(3, 1, 4), meta(2, 1))),
        (aten.add.Tensor, (meta(3, 4, dtype=torch.float16), meta(4))),
        (aten.mul.Tensor, (meta(3, 4).t(), meta(4, 3))),
        (aten.cat.default, ([meta(2, 3), meta(2, 5)], 1)),
        (aten.sum.dim_IntList, (meta(2, 3, 4), [1], True)),
        (aten.clone.default, (meta(4, 6)[:, ::2],)),
        (aten.pow.Tensor_Scalar, (meta(4, dtype=torch.int64), 2)),
        (aten.pow.Tensor_Scalar, (meta(4, dtype=torch.int64), 2.0)),
        (aten.gt.Scalar, (meta(4), 1)),
    ],
)
def test_a_call_again_gives_an_equal_tensor_of_its_own(func, args):
    known = KnownResults()
    first, second = (known.call(func, args, {}) for _ in range(2))
    assert kind(first) == kind(second) == kind(func(*args))
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_numbers_of_other_types_are_other_calls():
    known, x = KnownResults(), meta(4, dtype=torch.int64)
    kinds = [known.call(aten.mul.Scalar, (x, number), {}).dtype for number in (True, 1, 1.0, True, 1, 1.0)]
    assert kinds == [torch.int64, torch.int64, torch.float32] * 2


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.view.default, (meta(4, 6), [24])),
        (aten.t.default, (meta(4, 6),)),
        (aten._unsafe_view.default, (meta(4, 6), [24])),
        (aten.add_.Tensor, (meta(4), meta(4))),
    ],
)
def test_what_shares_memory_goes_on_sharing_it(func, args):
    known = KnownResults()
    for _ in range(2):
        out = known.call(func, args, {})
        assert out.untyped_storage()._cdata == args[0].untyped_storage()._cdata


def test_several_results_are_computed_every_time():
    known = KnownResults()
    for _ in range(2):
        first, second = known.call(aten.split.Tensor, (meta(4, 6), 3, 1), {})
        assert first.shape == second.shape == (4, 3)
