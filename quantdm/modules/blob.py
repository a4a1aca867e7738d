"""The stored tensors of one quantized weight as one piece of bytes.

Wide elements come first, so that every tensor is aligned in a blob that starts at an aligned address; the end is padded
so that blobs behind each other in a file stay aligned.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from quantdm.errors import QuantDMError
from quantdm.quantizers import stored_tensors
from quantdm.schemes import Scheme

ALIGNMENT = 8  # bytes; safetensors aligns its data to as much


class _Place(NamedTuple):
    name: str
    first: int  # byte
    size: int  # bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=65536)
def _places(shape: tuple[int, ...], scheme: Scheme, split: int | None) -> tuple[_Place, ...]:
    """Return where the stored tensors lie, in the order of the blob."""
    places, first = [], 0
    stored = stored_tensors(shape, scheme, split)
    for name, (size, dtype) in sorted(stored.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        nbytes = dtype.itemsize * torch.Size(size).numel()
        places.append(_Place(name, first, nbytes, size, dtype))
        first += nbytes
    return tuple(places)


def blob_size(shape: tuple[int, ...], scheme: Scheme, split: int | None) -> int:
    """Return the bytes of the blob of a weight of this shape, padding included."""
    last = _places(shape, scheme, split)[-1]
    return _padded(last.first + last.size)


def join_tensors(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...], scheme: Scheme, split: int | None
) -> torch.Tensor:
    """Return the stored tensors' bytes, uint8 [blob_size]."""
    places = _places(shape, scheme, split)
    parts = [tensors[place.name].detach().contiguous().reshape(-1).view(torch.uint8) for place in places]
    size = sum(part.numel() for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(_padded(size) - size)])


def split_blob(
    blob: torch.Tensor, shape: tuple[int, ...], scheme: Scheme, split: int | None
) -> dict[str, torch.Tensor]:
    """Return the stored tensors as views into a blob (the inverse of `join_tensors`).

    Raises:
        QuantDMError: the blob has another size or dtype than a weight of this shape needs.
    """
    expected = blob_size(shape, scheme, split)
    if blob.shape != (expected,) or blob.dtype != torch.uint8:
        raise QuantDMError(f"packed weight: got {blob.dtype} {tuple(blob.shape)}, expected torch.uint8 ({expected},)")
    return {
        place.name: blob[place.first : place.first + place.size].view(place.dtype).view(place.shape)
        for place in _places(shape, scheme, split)
    }


def sparing_bytes(fn: Any) -> Any:
    """Return what moves tensors as `fn` does, and casts no bytes (`.type(dtype)` would)."""

    def moved_only(tensor: torch.Tensor) -> torch.Tensor:
        new = fn(tensor)
        return new if tensor.dtype != torch.uint8 or new.dtype == torch.uint8 else tensor.to(new.device)

    return moved_only
