"""Where a bank reads weights from: a denoiser in memory, or its safetensors files, one tensor at a time."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from quantdm.errors import QuantDMError, nearest
from quantdm.files import open_tensors


def weight_reader(source: nn.Module | str | Path) -> Callable[[str], torch.Tensor]:
    """Return a function from a parameter's name to its tensor; tensors of files are memory-mapped.

    `source` is a denoiser, a safetensors file, or a folder of them (the shards of one checkpoint).

    Raises:
        QuantDMError: no such file, no safetensors in the folder, or damaged. The function: no such tensor, or one that
            two files hold.
    """
    if isinstance(source, nn.Module):
        return _module_reader(source)
    path = Path(source)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise QuantDMError(f"{path}: no safetensors files; expected the folder or the file of a denoiser's weights")
    holders: dict[str, list[Path]] = {}
    for file in files:
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                holders.setdefault(name, []).append(file)

    def read(name: str) -> torch.Tensor:
        found = holders.get(name, [])
        if len(found) > 1:
            raise QuantDMError(f"{path}: {name} is in {found[0].name} and in {found[1].name}; name one of the files")
        if not found:
            raise QuantDMError(f"{path}: no tensor {name!r}; {nearest(name, holders)}")
        with open_tensors(found[0]) as file:
            return file.get_tensor(name)

    return read


def _module_reader(module: nn.Module) -> Callable[[str], torch.Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))

    def read(name: str) -> torch.Tensor:
        if name not in parameters:
            raise QuantDMError(f"{type(module).__name__}: no parameter {name!r}; {nearest(name, parameters)}")
        return parameters[name].detach()

    return read
