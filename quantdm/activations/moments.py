"""Gather the second moments of every layer's inputs along sampling trajectories, for the calibrated options."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantdm.activations.distinct import DistinctVectors
from quantdm.denoisers.calls import Call, layer_input, replay
from quantdm.denoisers.weights import CONVOLUTIONS
from quantdm.errors import QuantDMError, counted, nearest
from quantdm.files import digest, save_tensors
from quantdm.machine import give_back_freed
from quantdm.pipelines.sketch import sketch_of
from quantdm.pipelines.tensor_files import map_tensor
from quantdm.quantizers import Moments
from quantdm.recipe.joint import joint_prefix, split_name

_log = logging.getLogger("quantdm")

BUDGET_BYTES = 2**31
ROWS = 2**13  # input vectors that are multiplied at a time
# Columns from which sums are kept in float32 and made piece by piece: the widest of SDXL, 23,040, would take 4 GB in
# float64, and half as much again for every product. A thousand sums of float32 are good to five digits.
WIDE, PIECE = 2**13, 2**11


def gather_moments(
    denoiser: nn.Module,
    calls: Sequence[Call],
    layer_names: Sequence[str],
    *,
    budget_bytes: int = BUDGET_BYTES,
    folder: str | Path | None = None,
) -> Mapping[str, Moments]:
    """Return the second moments of the inputs of every layer over recorded calls.

    Moments are n x n per layer, so layers are gathered in groups whose sums fit into `budget_bytes` (a larger
    layer makes a group of its own); every group replays all calls. Attention poolers read their weights without calling
    the layers: such inputs are never seen and count all alike, which is logged.

    Args:
        denoiser: in full precision; it is left as it was.
        calls: of this denoiser, as `calibration_calls` records them.
        layer_names: Linear or Conv layers.
        folder: where moments are written, one file per layer, and memory-mapped from; layers that are there already
            for the same weights and calls are not gathered again. None: all are returned in memory, as float32.

    Raises:
        QuantDMError: no calls, a name that is no Linear or Conv layer, or a layer that the calls never run.
    """
    if not calls:
        raise QuantDMError("calls: got none, expected at least one; record them with calibration_calls")
    modules = dict(denoiser.named_modules())
    for name in layer_names:
        if not isinstance(modules.get(name), (nn.Linear, *CONVOLUTIONS)):
            raise QuantDMError(f"layer_names: {name!r} is no Linear or Conv layer; {nearest(name, modules)}")
    layers = {name: modules[name] for name in layer_names}
    if folder is None:
        return {
            name: found for group in _groups(layers, budget_bytes) for name, found in _gather(group, denoiser, calls)
        }
    stored = StoredMoments(folder, layers, _key(denoiser, calls))
    missing = {name: module for name, module in layers.items() if not stored.path(name).is_file()}
    for group in _groups(missing, budget_bytes):
        for name, found in _gather(group, denoiser, calls):
            save_tensors(stored.path(name), {"second": found.second}, {"count": found.count})
            del found  # gigabytes of the widest layers, while the next group is gathered
        give_back_freed()
    return stored


class LazyMoments(Mapping[str, Moments]):
    """Moments that are gathered when they are asked for, a group of layers at a time; only one group is kept.

    Asked in the order of the layers, every group replays the calls once. The denoiser must stay as it is meanwhile.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        calls: Sequence[Call],
        layer_names: Sequence[str],
        *,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        self.denoiser, self.calls = denoiser, calls
        layers = {name: denoiser.get_submodule(name) for name in layer_names}
        self._groups = list(_groups(layers, budget_bytes))
        self._now: dict[str, Moments] = {}

    def __getitem__(self, name: str) -> Moments:
        if name not in self._now:
            group = next((group for group in self._groups if name in group), None)
            if group is None:
                raise KeyError(name)
            self._now = {}  # first, so that two groups are never there at once
            self._now = dict(_gather(group, self.denoiser, self.calls))
        return self._now[name]

    def __iter__(self) -> Iterator[str]:
        return (name for group in self._groups for name in group)

    def __len__(self) -> int:
        return sum(map(len, self._groups))


class StoredMoments(Mapping[str, Moments]):
    """Moments in files, one per layer, memory-mapped when they are asked for and never kept."""

    def __init__(self, folder: str | Path, layer_names: Iterable[str], key: str) -> None:
        self.folder, self.layer_names, self.key = Path(folder), tuple(layer_names), key

    def path(self, name: str) -> Path:
        """Return the file of one layer."""
        return self.folder / f"{digest(self.key, name)}.safetensors"

    def __getitem__(self, name: str) -> Moments:
        if name not in self.layer_names:
            raise KeyError(name)
        return moments_in(self.path(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.layer_names)

    def __len__(self) -> int:
        return len(self.layer_names)


def moments_in(path: Path) -> Moments:
    """Return the moments of a layer's file, memory-mapped."""
    second, metadata, let_go = map_tensor(path, "second")
    return Moments(second, metadata["count"], let_go)


class JointMoments(Mapping[str, Moments]):
    """The moments of several denoisers under joint names: those of every one but the first are called `PART:layer`."""

    def __init__(self, parts: Mapping[str, Mapping[str, Moments]]) -> None:
        self.parts = dict(parts)

    def __getitem__(self, name: str) -> Moments:
        part, own = split_name(name, tuple(self.parts))
        return self.parts[part][own]

    def path(self, name: str) -> Path | None:
        """Return the file of one layer; None: its moments are in memory."""
        part, own = split_name(name, tuple(self.parts))
        moments = self.parts[part]
        return moments.path(own) if isinstance(moments, StoredMoments) else None

    def __iter__(self) -> Iterator[str]:
        for number, (part, moments) in enumerate(self.parts.items()):
            yield from (joint_prefix(part, number) + name for name in moments)

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))


def input_vectors(module: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors [G, M, n] that a Linear or Conv layer multiplies its weight.reshape(C_out, -1) with.

    M counts tokens, or places of the output; n follows the order of the weight. G is the number of conv groups.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(module, CONVOLUTIONS)
    dims = len(module.kernel_size)
    if module.padding_mode == "zeros":
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice)
    else:
        x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    for d in range(dims):  # [B, C, *places, *kernel]
        reach = module.dilation[d] * (module.kernel_size[d] - 1) + 1
        x = x.unfold(2 + d, reach, module.stride[d])[..., :: module.dilation[d]]
    x = x.unflatten(1, (module.groups, -1))  # [B, G, C/G, *places, *kernel]
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    return x.permute(order).reshape(module.groups, -1, x.shape[2] * math.prod(module.kernel_size))


@torch.no_grad()
def _gather(
    layers: Mapping[str, nn.Module], denoiser: nn.Module, calls: Sequence[Call]
) -> Iterator[tuple[str, Moments]]:
    """Yield the moments of some layers; their sums are freed one by one."""
    sums: dict[str, Tensor] = {}
    counts, distinct = dict.fromkeys(layers, 0), DistinctVectors()

    def hook(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        whole = layer_input(name, args, kwargs).detach()
        for x in whole.split(max(1, _batch(module, whole))):
            vectors = input_vectors(module, x.float())
            distinct.add(name, vectors)
            for part in vectors.split(ROWS, dim=1):
                _add(sums, name, part)
            counts[name] += vectors.shape[1]

    handles = [
        module.register_forward_pre_hook(partial(hook, name), with_kwargs=True) for name, module in layers.items()
    ]
    owners, ran = {name: name.rpartition(".")[0] for name in layers}, set[str]()
    for owner in set(owners.values()) - {""}:
        handles.append(denoiser.get_submodule(owner).register_forward_pre_hook(lambda *_, owner=owner: ran.add(owner)))
    try:
        for call in calls:
            replay(denoiser, [call])
    finally:
        for handle in handles:
            handle.remove()
    _warn_of_rank(sums, {name: distinct.count(name) for name in counts if not distinct.sees_the_step_alone(name)})
    for name, count in counts.items():
        if count:
            yield name, Moments(sums.pop(name).div_(count).float(), count)
        elif owners[name] in ran:
            _log.warning("%s: its module reads the weight without calling the layer; calibrated on nothing", name)
            yield name, _unseen(layers[name])
        else:
            raise QuantDMError(
                f"{name}: no input in {counted(len(calls), 'call')}; leave it out, or calibrate where it runs"
            )


def _warn_of_rank(sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
    few = {name: count for name, count in counts.items() if name in sums and count < sums[name].shape[-1]}
    if few:
        name, count = next(iter(few.items()))
        _log.warning(
            "%s with fewer different input vectors than columns, first %s (%d of %d): the moments have no full rank, "
            "and what was not seen counts little; calibrate on more images, steps or prompts",
            counted(len(few), "layer"), name, count, sums[name].shape[-1],
        )  # fmt: skip


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add the products of some vectors [G, M, n] to the sum of a layer, [G, n, n]."""
    columns = part.shape[-1]
    if columns < WIDE:
        product = part.mT @ part  # float32 over ROWS vectors, then float64: a sum of thousands keeps its digits
        sums[name] = sums[name].add_(product) if name in sums else product.double()
        return
    total = sums[name] if name in sums else sums.setdefault(name, part.new_zeros(len(part), columns, columns))
    for start in range(0, columns, PIECE):
        total[:, start : start + PIECE] += part[..., start : start + PIECE].mT @ part


def _unseen(module: nn.Module) -> Moments:
    """Return the moments of inputs that nobody saw: all alike, so that every weight counts the same."""
    weight: Any = module.weight
    columns = weight[0].numel()
    return Moments(torch.eye(columns).expand(getattr(module, "groups", 1), -1, -1).contiguous(), 0)


def _batch(module: nn.Module, x: Tensor) -> int:
    """Return how many samples to unfold at a time: patches take kernel-size times the room of their image."""
    if not isinstance(module, CONVOLUTIONS):
        return len(x)
    return int(2**24 / max(x[0].numel() * math.prod(module.kernel_size), 1))


def _groups(layers: Mapping[str, nn.Module], budget_bytes: int) -> Iterator[dict[str, nn.Module]]:
    group: dict[str, nn.Module] = {}
    size = 0
    for name, module in layers.items():
        weight: Any = module.weight
        columns = weight[0].numel()
        own = (8 if columns < WIDE else 4) * columns**2 * getattr(module, "groups", 1)
        if group and size + own > budget_bytes:
            yield group
            group, size = {}, 0
        group[name] = module
        size += own
    if group:
        yield group


def _key(denoiser: nn.Module, calls: Sequence[Call]) -> str:
    """Return a digest of what determines the inputs of every layer: weights, and inputs of the calls.

    Outputs alone do not tell: those of a network whose last layer is zero are all alike.
    """
    told = [_content([call.args, call.kwargs, call.output]) for call in calls]
    return digest(type(denoiser).__name__, sketch_of(denoiser), told)


def _content(value: Any) -> Any:
    """Return what a call was given with its tensors as their hashes."""
    if torch.is_tensor(value):
        return digest(value)
    if isinstance(value, Mapping):
        return {str(key): _content(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
