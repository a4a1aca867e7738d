"""Example inputs that a user gives: as tensors, as a captured call, or as text in a file. Values do not matter."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from quantdm.errors import QuantDMError, told
from quantdm.recipe.plain_yaml import load_yaml

_TENSOR = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d, ]*)\]")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)
}


def describe_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return example inputs as plain values for JSON or YAML: a tensor becomes text such as "float32[2, 4, 64, 64]".

    Raises:
        QuantDMError: a value that is no tensor, number, text, None, or a list or mapping of them.
    """
    return {str(key): _describe(value, str(key)) for key, value in inputs.items()}


def parse_inputs(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that `describe_inputs` described, with tensors on the meta device.

    Raises:
        QuantDMError: a dtype that is not known.
    """
    return {key: _parse(value, key) for key, value in record.items()}


def read_inputs(path: str | Path) -> dict[str, Any]:
    """Read example inputs from a YAML or JSON file: argument -> "dtype[shape]", a number, a list or a mapping.

    Raises:
        QuantDMError: no such file, not YAML, or not a mapping.
    """
    try:
        with told(f"example inputs {path}"):
            record = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QuantDMError(f"example inputs {path}: cannot be read ({error}); expected a YAML file") from None
    except yaml.YAMLError as error:
        raise QuantDMError(f"example inputs {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(record, dict) or not record or not all(isinstance(key, str) for key in record):
        raise QuantDMError(
            f"example inputs {path}: got a {type(record).__name__}, expected the keyword arguments of one call of the "
            "denoiser, e.g. `hidden_states: float32[2, 4, 64, 64]`"
        )
    return parse_inputs(record)


def _describe(value: Any, where: str) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return f"{str(dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return {str(key): _describe(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise QuantDMError(
        f"example_inputs: {where} is a {type(value).__name__}, expected tensors, numbers, text, None, lists or mappings"
    )


def _parse(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _parse(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_parse(item, f"{where}[{index}]") for index, item in enumerate(value))
    match = _TENSOR.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if match["dtype"] not in _DTYPES:
        raise QuantDMError(f"example inputs: {where} has dtype {match['dtype']!r}, expected {', '.join(_DTYPES)}")
    shape = [int(size) for size in match["shape"].split(",") if size.strip()]
    return torch.empty(shape, dtype=_DTYPES[match["dtype"]], device="meta")
