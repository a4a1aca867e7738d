"""A denoiser in one safetensors file: under diffusers' names, or under those of its authors."""

from pathlib import Path
from typing import Any

from torch import nn

from quantdm.errors import QuantDMError
from quantdm.pipelines.tensor_files import LazyTensor


def open_single_file(path: Path, config: str | Path | None) -> tuple[nn.Module, dict[str, LazyTensor]]:
    raise QuantDMError("not yet")
